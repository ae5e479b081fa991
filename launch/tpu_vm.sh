#!/bin/bash
# Runs moejax on every host of a Cloud TPU slice, from your own machine, with gcloud set up:
#
#   launch/tpu_vm.sh NAME ZONE --config=experiments/olmoe_1b_7b.py --workdir=/mnt/shared/runs/olmoe
#
# NAME is an existing TPU VM, on whose hosts this repository lies in ~/moejax, installed with pip install -e ".[tpu]":
#
#   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all --command='git clone URL moejax && pip install -e "moejax[tpu]"'
#
# The workdir must be on a file system that all hosts share (a Filestore or a Cloud Storage mount). The processes find
# each other by the slice's metadata; no flag is needed. The run goes on if the connection breaks; to stop it with a
# checkpoint, send SIGTERM to one of its processes:
#
#   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=0 --command='pkill -TERM -f moejax.main'

set -euo pipefail

name=$1 zone=$2
shift 2
command="cd ~/moejax && nohup python3 -m moejax.main$(printf ' %q' "$@") > ~/moejax.log 2>&1 & tail -f --pid=\$! ~/moejax.log"
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$command"
