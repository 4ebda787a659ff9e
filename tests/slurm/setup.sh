#!/usr/bin/env bash
# A real SLURM of one node on this machine, as root and without systemd: munged, slurmctld, slurmd from Debian's packages.
# Idempotent. Ends when the node is idle, or with status 1 and the last lines of the logs.
set -euo pipefail
ROOT=${1:-/tmp/uniproj-slurm}

if ! command -v slurmctld > /dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurm-wlm munge > /dev/null
fi
mkdir -p "$ROOT"/{state,spool,log} /run/munge /etc/slurm
chown munge: /run/munge
[ -s /etc/munge/munge.key ] || { head -c 1024 /dev/urandom > /etc/munge/munge.key; }
chown munge: /etc/munge/munge.key
chmod 400 /etc/munge/munge.key

NAME=$(hostname -s)
cat > /etc/slurm/slurm.conf <<CONF
ClusterName=uniproj
SlurmctldHost=$NAME(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
StateSaveLocation=$ROOT/state
SlurmdSpoolDir=$ROOT/spool
SlurmctldPidFile=$ROOT/slurmctld.pid
SlurmdPidFile=$ROOT/slurmd.pid
SlurmctldLogFile=$ROOT/log/slurmctld.log
SlurmdLogFile=$ROOT/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
JobRequeue=1
KillWait=30
MpiDefault=none
NodeName=$NAME NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=test Nodes=$NAME Default=YES MaxTime=60 State=UP
CONF

pgrep -x munged > /dev/null || runuser -u munge -- munged
pgrep -x slurmctld > /dev/null || slurmctld
pgrep -x slurmd > /dev/null || slurmd
for _ in $(seq 60); do
    [ "$(sinfo -h -o %T 2> /dev/null)" = idle ] && exit 0
    sleep 1
done
echo "setup: the node must become idle within a minute, got $(sinfo -h -o %T 2>&1)." >&2
tail -n 5 "$ROOT"/log/*.log >&2
exit 1
