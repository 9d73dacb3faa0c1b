#!/usr/bin/env bash
# GradSPO on the embedded tiny world, on the CPU, in an environment made on first use: trains, then
# compares the result with the base on held-out prompts.
#   bash launch_tiny.sh [--num_processes N] [--config=FILE] [--config.key=value ...]
set -euo pipefail
cd "$(dirname "$0")"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}  # for an environment without this package
PYTHON=$(bash scripts/setup_env.sh)
# More threads only wait for each other on tensors this small; a second process does not.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# macOS, which tells no affinity, has two cores or more.
cores='import os; print(min(2, len(getattr(os, "sched_getaffinity", lambda _: "12")(0))))'
processes=$("$PYTHON" -c "$cores")
logdir=runs run_name=tiny_$(date +%Y%m%d_%H%M%S)_$RANDOM
for argument in "$@"; do
    case $argument in
    --config.logdir=*) logdir=${argument#*=} ;;
    --config.run_name=*) run_name=${argument#*=} ;;
    esac
done
"$PYTHON" -m spo.launch --cpu --num_processes "$processes" train_sd15.py --config=config/tiny.py \
    --config.run_name="$run_name" "$@"
"$PYTHON" scripts/evaluate_tiny.py "$logdir/$run_name"
