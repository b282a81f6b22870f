#!/usr/bin/env bash
# bash scripts/pretrain.sh [llava.train.train flags]: LLaVA-1.5's first stage, the projector alone on 558,000 captions.
# MODEL, VISION_TOWER, DATA, IMAGES, OUTPUT, BATCH and what scripts/train_common.sh names override; later flags win.
# 8 × A100: bash scripts/pretrain.sh      with compression: COMPRESSION=configs/llava7b_r50.yaml bash scripts/pretrain.sh
set -euo pipefail
. "$(dirname "$0")/train_common.sh"
launch --deepspeed "$root/scripts/zero2.json" \
    --model_name_or_path "${MODEL:-lmsys/vicuna-7b-v1.5}" \
    --version plain \
    --data_path "${DATA:-playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json}" \
    --image_folder "${IMAGES:-playground/data/LLaVA-Pretrain/images}" \
    --vision_tower "${VISION_TOWER:-openai/clip-vit-large-patch14-336}" \
    --mm_projector_type mlp2x_gelu \
    --tune_mm_mlp_adapter True \
    --mm_vision_select_layer -2 \
    --mm_use_im_start_end False \
    --mm_use_im_patch_token False \
    --bf16 True \
    --output_dir "${OUTPUT:-checkpoints/llava-v1.5-7b-pretrain}" \
    --num_train_epochs 1 \
    --per_device_train_batch_size "${BATCH:-32}" \
    --gradient_accumulation_steps 1 \
    --save_strategy steps \
    --save_steps 24000 \
    --save_total_limit 1 \
    --learning_rate 1e-3 \
    --weight_decay 0. \
    --warmup_ratio 0.03 \
    --lr_scheduler_type cosine \
    --logging_steps 1 \
    --tf32 True \
    --model_max_length 2048 \
    --gradient_checkpointing True \
    --dataloader_num_workers 4 \
    --lazy_preprocess True \
    --report_to "${REPORT_TO:-none}" \
    "$@"
