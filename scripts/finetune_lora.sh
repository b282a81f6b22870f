#!/usr/bin/env bash
# bash scripts/finetune_lora.sh [llava.train.train flags]: LLaVA-1.5's second stage with LoRA adapters; fits one GPU of a few dozen GB (not measured)
# with GPUS=1 BATCH=4 and --gradient_accumulation_steps 32. It is finetune.sh with other settings: the same variables override.
set -euo pipefail
export OUTPUT="${OUTPUT:-checkpoints/llava-v1.5-7b-lora}"
exec bash "$(dirname "$0")/finetune.sh" --lora_enable True --lora_r 128 --lora_alpha 256 --learning_rate 2e-4 --mm_projector_lr 2e-5 "$@"
