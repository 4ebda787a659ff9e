#!/usr/bin/env bash
# Stop what setup.sh started, by the process ids that the daemons wrote.
ROOT=${1:-/tmp/uniproj-slurm}
for file in "$ROOT"/slurmd.pid "$ROOT"/slurmctld.pid /run/munge/munged.pid; do
    [ -s "$file" ] && kill "$(cat "$file")"
done
exit 0
