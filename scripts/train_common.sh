# Source me from a training script: finds Python, and gives `launch MODULE-ARGUMENTS…`.
#   GPUS     processes on this machine (default: the GPUs there are, else 1)
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   for several machines (torchrun); HOSTFILE for DeepSpeed's launcher instead
#   COMPRESSION   a YAML file of configs/: train with that compression
#   ATTENTION     sdpa (default), flash_attention_2 or eager
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
. "$root/scripts/env.sh" train

launch() {
    local gpus="${GPUS:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
    local more=(--attn_implementation "${ATTENTION:-sdpa}")
    if [ -n "${COMPRESSION:-}" ]; then more+=(--compression "$COMPRESSION"); fi
    if [ -n "${HOSTFILE:-}" ]; then
        exec deepspeed --hostfile "$HOSTFILE" "$root/llava/train/train.py" "${more[@]}" "$@"
    fi
    local where=(--standalone)
    if [ "${NNODES:-1}" -gt 1 ]; then
        where=(--nnodes "$NNODES" --node_rank "${NODE_RANK:?}" --master_addr "${MASTER_ADDR:?}" --master_port "${MASTER_PORT:-29500}")
    fi
    exec python -m torch.distributed.run "${where[@]}" --nproc_per_node "$gpus" -m llava.train.train "${more[@]}" "$@"
}
