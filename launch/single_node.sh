#!/usr/bin/env bash
# Train on this machine, one process per GPU:
#
#   launch/single_node.sh recipe=grit_mistral7b parallel=zero2 run_dir=runs/grit resume=auto [key=value ...]
#
# Environment:
#   NPROC_PER_NODE    processes (default: the GPUs that nvidia-smi lists, or 1)
#   OMP_NUM_THREADS   threads of a process (default: its share of the cores)
#   PYTHON            interpreter (default: python)
#   UNIFIED_LM_DRY=1  print the command instead of running it
# `kill -USR1` (or SIGTERM) of this script: finish the step, save, exit with 0. Start again with resume=auto.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/supervise.sh
source "$here/supervise.sh"
# shellcheck source=launch/settings.sh
source "$here/settings.sh"
require_recipe "$@"

# --standalone: a rendezvous on a free port of this machine, so that several runs do not meet.
supervise "$PYTHON" -m torch.distributed.run \
    --standalone \
    --nproc-per-node="$NPROC_PER_NODE" \
    "$here/../train.py" "$@"
