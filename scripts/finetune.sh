#!/usr/bin/env bash
# bash scripts/finetune.sh [llava.train.train flags]: LLaVA-1.5's second stage, decoder and projector on 665,000 conversations.
# MODEL, VISION_TOWER, PROJECTOR, DATA, IMAGES, OUTPUT, BATCH, ZERO (2, 3 or 3_offload) and what scripts/train_common.sh names
# override; later flags win. 8 × A100: COMPRESSION=configs/llava7b_r50.yaml bash scripts/finetune.sh
set -euo pipefail
. "$(dirname "$0")/train_common.sh"
launch --deepspeed "$root/scripts/zero${ZERO:-3}.json" \
    --model_name_or_path "${MODEL:-lmsys/vicuna-7b-v1.5}" \
    --version v1 \
    --data_path "${DATA:-playground/data/llava_v1_5_mix665k.json}" \
    --image_folder "${IMAGES:-playground/data}" \
    --vision_tower "${VISION_TOWER:-openai/clip-vit-large-patch14-336}" \
    --pretrain_mm_mlp_adapter "${PROJECTOR:-checkpoints/llava-v1.5-7b-pretrain/mm_projector.bin}" \
    --mm_projector_type mlp2x_gelu \
    --mm_vision_select_layer -2 \
    --mm_use_im_start_end False \
    --mm_use_im_patch_token False \
    --image_aspect_ratio pad \
    --group_by_modality_length True \
    --bf16 True \
    --output_dir "${OUTPUT:-checkpoints/llava-v1.5-7b}" \
    --num_train_epochs 1 \
    --per_device_train_batch_size "${BATCH:-16}" \
    --gradient_accumulation_steps 1 \
    --save_strategy steps \
    --save_steps 1000 \
    --save_total_limit 1 \
    --learning_rate 2e-5 \
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
