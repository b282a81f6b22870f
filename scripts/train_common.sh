# Source me from a training script: finds Python, and gives `is_llava MODEL` and `launch MODULE-ARGUMENTS…`.
#   GPUS     processes on this machine (default: the GPUs there are, else 1)
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   for several machines, on each of them (torchrun)
#   HOSTFILE   for DeepSpeed's launcher instead, on one of them by ssh (MASTER_ADDR: asked by ssh too, if not given);
#              with NODE_RANK and MASTER_ADDR on each of them, without ssh
#   COMPRESSION   a method, a row by name or a YAML file of configs/: train with that compression
#   ATTENTION     sdpa (default), flash_attention_2 or eager
#   VISION_TOWER  (default: CLIP ViT-L/14 at 336 pixels; a LLaVA checkpoint brings its own); REPORT_TO (default: none)
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
. "$root/scripts/env.sh" train

# Whether a folder or hub name is a LLaVA checkpoint, which brings its projector, vision tower and settings along.
is_llava() {
    python - "$1" 2>/dev/null <<'EOF'
import json, sys
from pathlib import Path

from libra.checkpoints import find_checkpoint, hub_file

found = find_checkpoint(sys.argv[1])
path = Path(found, "config.json") if Path(found).is_dir() else hub_file(found, "config.json")
sys.exit("mm_vision_tower" not in json.loads(path.read_text(encoding="utf-8")))
EOF
}

launch() {
    local gpus="${GPUS:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
    local more=(
        --attn_implementation "${ATTENTION:-sdpa}"
        --bf16 True
        --tf32 True
        --num_train_epochs 1
        --gradient_accumulation_steps 1
        --save_strategy steps
        --save_total_limit 1
        --weight_decay 0.
        --warmup_ratio 0.03
        --lr_scheduler_type cosine
        --logging_steps 1
        --gradient_checkpointing True
        --dataloader_num_workers 4
        --lazy_preprocess True
        --report_to "${REPORT_TO:-none}"
    )
    if is_llava "$model"; then
        if [ -n "${VISION_TOWER:-}" ]; then more+=(--vision_tower "$VISION_TOWER"); fi
    else
        more+=(
            --vision_tower "${VISION_TOWER:-openai/clip-vit-large-patch14-336}"
            --mm_projector_type mlp2x_gelu
            --mm_vision_select_layer -2
            --mm_use_im_start_end False
            --mm_use_im_patch_token False
            --model_max_length 2048
        )
    fi
    if [ -n "${COMPRESSION:-}" ]; then more+=(--compression "$COMPRESSION"); fi
    # Every file, flag and setting is looked at before processes are started.
    python -m llava.train.train --check_only --model_name_or_path "$model" "${more[@]}" "$@" || exit
    local where=(--standalone)
    if [ -n "${HOSTFILE:-}" ]; then
        if [ ! -f "$HOSTFILE" ]; then # DeepSpeed would take only this machine
            echo "error: there is no file $HOSTFILE; HOSTFILE has a line like 'machine slots=8' for each machine" >&2
            exit 2
        fi
        where=(--hostfile "$HOSTFILE" --master_port "${MASTER_PORT:-29500}")
        if [ -n "${MASTER_ADDR:-}" ]; then where+=(--master_addr "$MASTER_ADDR"); fi
        if [ -n "${NODE_RANK:-}" ]; then where+=(--no_ssh --node_rank "$NODE_RANK"); fi
        exec deepspeed "${where[@]}" "$root/llava/train/train.py" \
            --model_name_or_path "$model" "${more[@]}" "$@"
    fi
    if [ "${NNODES:-1}" -gt 1 ]; then
        if [ -z "${NODE_RANK:-}" ] || [ -z "${MASTER_ADDR:-}" ]; then
            echo "error: NNODES=$NNODES needs NODE_RANK (this machine's number, from 0) and MASTER_ADDR (number 0's address)" >&2
            exit 2
        fi
        where=(--nnodes "$NNODES" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}")
    fi
    exec python "$root/scripts/launch.py" "${where[@]}" --nproc_per_node "$gpus" -m llava.train.train \
        --model_name_or_path "$model" "${more[@]}" "$@"
}
