#!/usr/bin/env bash
# Train on several machines. Run this on every one of them, with the same arguments:
#
#   NNODES=2 MASTER_ADDR=node0 launch/multi_node.sh recipe=grit_mistral7b parallel=zero3 run_dir=/shared/runs/grit resume=auto
#
# The run directory, the data and the model must be on storage that every machine sees. The machines find each other at
# MASTER_ADDR:MASTER_PORT, and ranks are numbered there: it does not matter which machine starts first.
#
# Environment:
#   NNODES            machines (required; under Slurm its own)
#   MASTER_ADDR       name or address of one of them, as the others reach it (required)
#   MASTER_PORT       a port that is free there (default: 29400)
#   RUN_ID            tells this run from others at the same address (default: the Slurm job, or "unified_lm")
#   NPROC_PER_NODE, OMP_NUM_THREADS, PYTHON, UNIFIED_LM_DRY: as in single_node.sh
#   NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME: the network interface, where NCCL chooses a slow one (`ip -br address` lists them)
#   NCCL_IB_HCA, NCCL_IB_DISABLE: the InfiniBand adapters, or none; NCCL_DEBUG=INFO tells what was chosen
#
# No restarts by torchrun (--max-restarts=0): a dead machine ends the run on all of them, and the next start resumes it with
# resume=auto. Restarting workers in place would keep a broken machine in the group.
# `kill -USR1` (or SIGTERM) of this script on any machine: all finish the step, save, exit with 0.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/supervise.sh
source "$here/supervise.sh"
# shellcheck source=launch/settings.sh
source "$here/settings.sh"
require_recipe "$@"

NNODES="${NNODES:-${SLURM_NNODES:?NNODES is not set: the number of machines}}"
: "${MASTER_ADDR:?MASTER_ADDR is not set: name or address of one of the machines}"

# Wait 15 minutes for the last machine: start-up scripts of a cluster take their time. An agent whose workers have ended waits half a
# minute for one that does not answer any more.
supervise "$PYTHON" -m torch.distributed.run \
    --nnodes="$NNODES" \
    --nproc-per-node="$NPROC_PER_NODE" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$MASTER_ADDR:${MASTER_PORT:-29400}" \
    --rdzv-id="${RUN_ID:-${SLURM_JOB_ID:-unified_lm}}" \
    --rdzv-conf=join_timeout=900,read_timeout=30 \
    --max-restarts=0 \
    "$here/../train.py" "$@"
