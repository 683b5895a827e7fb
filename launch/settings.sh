# shellcheck shell=bash
# Sourced by the launchers: how many processes and threads, what NCCL and the allocator are told. Whatever is set already is kept.

require_recipe() {
    local argument
    for argument in "$@"; do
        [[ "$argument" == recipe=* ]] && return
    done
    echo "error: no recipe. Usage: $(basename "$0") recipe=NAME [key=value ...]; \`unified-lm recipes\` lists them." >&2
    exit 2
}

gpus_here() {
    local count=0
    if command -v nvidia-smi >/dev/null; then
        count="$(nvidia-smi --list-gpus | wc -l)"
    fi
    echo $((count > 0 ? count : 1))
}

PYTHON="${PYTHON:-python}"
NPROC_PER_NODE="${NPROC_PER_NODE:-$(gpus_here)}"

# Data are drawn and packed on the CPU by every rank. torchrun would give each process one thread; more than its share of the cores
# would make the ranks wait for each other.
cores="$(nproc)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > NPROC_PER_NODE ? cores / NPROC_PER_NODE : 1))}"

# Tokenizers' own threads and the fork of a subprocess do not get along, and the token cache makes them needless.
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"

# Packs differ in length from step to step. Segments that can grow keep that from fragmenting the GPU's memory.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"

# NCCL says why a link fails, and nothing else.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# The last collectives of every rank are kept, and written out when one times out: they show which rank was elsewhere.
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
