#!/bin/bash
# Trains on several nodes under Slurm, one process for each GPU:
#
#   sbatch --nodes=4 launch/slurm.sh --config=experiments/olmoe_1b_7b.py --workdir=/shared/runs/olmoe
#
# Set the GPUs of a node below, add your account and partition, and load what your cluster needs (modules, a virtual
# environment) before srun. The config and the workdir must be on a file system that all nodes share.
#
# The processes find each other by what srun tells them; no flag is needed. Each takes the GPU of its number on the node,
# so every task must see all GPUs of the node (no --gpus-per-task). Five minutes before the time is up Slurm sends SIGTERM
# to them: the run saves and ends. Submitted again, it goes on.

#SBATCH --job-name=moejax
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300

set -euo pipefail

srun --kill-on-bad-exit=1 python -m moejax.main "$@"
