#!/usr/bin/env bash
# A real SLURM of one node on this machine, as root and without systemd: munged, slurmctld, slurmd from Debian's packages.
# All it writes lies in ROOT, and its ports are its own, so another SLURM of this machine is left alone: to use this one,
# set SLURM_CONF=ROOT/slurm.conf. Says "ready" when the node is idle and runs until its standard input ends (Ctrl-D):
# even a killed test session leaves no daemon behind. Ends with status 1 and the reason where it cannot be set up.
set -euo pipefail
ROOT=${1:-/tmp/uniproj-slurm} CONTROLLER=${2:-16817} NODE=${3:-16818}

if ! command -v slurmctld munged > /dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    timeout 60 apt-get update -qq > /dev/null
    timeout 240 apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge > /dev/null
fi

export SLURM_CONF=$ROOT/slurm.conf
mkdir -p "$ROOT"/{state,spool,log}
(umask 077 && head -c 1024 /dev/urandom > "$ROOT/munge.key")
NAME=$(hostname -s)
# cred_expire: for so long a requeued job waits, 120 seconds unless set
cat > "$SLURM_CONF" <<CONF
ClusterName=uniproj
SlurmctldHost=$NAME(127.0.0.1)
SlurmctldPort=$CONTROLLER
SlurmdPort=$NODE
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$ROOT/munge.socket,cred_expire=5
StateSaveLocation=$ROOT/state
SlurmdSpoolDir=$ROOT/spool
SlurmctldPidFile=$ROOT/slurmctld.pid
SlurmdPidFile=$ROOT/slurmd.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
ReturnToService=2
JobRequeue=1
KillWait=30
MpiDefault=none
NodeName=$NAME NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=test Nodes=$NAME Default=YES MaxTime=60 State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=$NAME MaxTime=60 State=UP PriorityTier=2 PreemptMode=OFF
CONF

stop() {
    scancel --me 2> /dev/null || true
    for _ in $(seq 20); do
        [ -z "$(squeue --noheader 2> /dev/null)" ] && break
        sleep 1
    done
    kill "${daemons[@]}" 2> /dev/null || true
    wait
}
daemons=()
trap stop EXIT
start() {
    "$@" < /dev/null > "$ROOT/log/$1.log" 2>&1 &
    daemons+=($!)
}
start munged --foreground --force --key-file="$ROOT/munge.key" --socket="$ROOT/munge.socket" \
    --pid-file="$ROOT/munged.pid" --seed-file="$ROOT/munge.seed" --log-file="$ROOT/log/munged.log"
start slurmctld -D
start slurmd -D

for _ in $(seq 60); do
    if [ "$(sinfo --noheader --partition=test --format=%T 2> /dev/null)" = idle ]; then
        echo ready
        cat > /dev/null
        exit 0
    fi
    sleep 1
done
echo "setup: the node must become idle within a minute, got $(sinfo --noheader --format=%T 2>&1)." >&2
tail -n 5 "$ROOT"/log/*.log >&2
exit 1
