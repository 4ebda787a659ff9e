#!/usr/bin/env bash
# Stop what setup.sh started.
pkill -x slurmd
pkill -x slurmctld
pkill -x munged
exit 0
