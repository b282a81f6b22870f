"""A training run from its arguments to the finished model."""

import torch
from transformers import set_seed
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from libra import Compression

from ..model.language_model.videollama2 import Videollama2MistralForCausalLM
from .arguments import DataArguments, ModelArguments, TrainingArguments, exit_with, parse
from .data import Collator, LazySupervisedDataset, VisualTokens, check_samples, read_samples
from .initial import Start, build_model, find_start, picture_settings
from .labels import training_template
from .trainer import LlavaTrainer, last_checkpoint


def prepare(
    model: ModelArguments, data: DataArguments, training: TrainingArguments
) -> tuple[Start, LazySupervisedDataset, Compression | None]:
    """Everything that can be wrong is found here, before weights are read.

    Raises:
        ValueError: one sentence.
    """
    template = training_template(model.version)
    compression = None if model.compression is None else Compression.from_yaml(model.compression)
    if compression is not None and compression.score_layer == "next" and (is_deepspeed_zero3_enabled() or training.fsdp):
        raise ValueError("score_layer: next runs a layer out of turn, which ZeRO-3 and FSDP cannot follow; use ZeRO-2")
    samples, videos = read_samples(data.data_path), data.video_folder or data.image_folder
    check_samples(samples, data.data_path, template, data.image_folder, videos)
    start = find_start(model, data, training, compression)
    video = next((number for number, sample in enumerate(samples) if "video" in sample), None)
    if video is not None and not start.takes_videos:
        raise ValueError(f"{data.data_path}, sample {video}: it has a video, and this model takes images only")
    if template is None and not start.tokenizer.chat_template:
        raise ValueError(f"--version {model.version} needs a tokenizer with a chat template; {start.folder} has none")
    dataset = LazySupervisedDataset(
        samples, start.tokenizer, template, start.image_processor, picture_settings(start.config), data.image_folder, videos,
        training.model_max_length, start.config.num_frames if start.takes_videos else None, start.config.mm_use_im_start_end,
    )
    return start, dataset, compression


def make_collator(llava, tokenizer, limit: int) -> Collator:
    """The collator that cuts where the model would."""
    counts = None
    if not isinstance(llava, Videollama2MistralForCausalLM):  # whose length counts text alone
        config, tower = llava.config, llava.get_vision_tower()
        patches = tower.num_patches + (tower.select_feature == "cls_patch")
        pinpoints = getattr(config, "image_grid_pinpoints", None)
        counts = VisualTokens(patches, tower.config.image_size, config.mm_patch_merge_type, pinpoints)
    return Collator(tokenizer.pad_token_id, limit, llava.placeholders, counts)


def train(argv: list[str]) -> None:
    """Train as the command line says; what is wrong with it ends the program with a sentence."""
    model_args, data_args, args = parse(argv)
    try:
        start, dataset, compression = prepare(model_args, data_args, args)
        set_seed(args.seed)  # a new projector begins alike in every process
        model = build_model(start, model_args, args)
    except (ValueError, ImportError) as error:
        exit_with(" ".join(str(error).split()))
    llava = model.get_base_model() if args.lora_enable else model
    llava.set_compression(compression)
    collator = make_collator(llava, start.tokenizer, args.model_max_length)
    dataset.visual_tokens = collator.visual_tokens
    trainer = LlavaTrainer(
        model=model, args=args, train_dataset=dataset, processing_class=start.tokenizer, data_collator=collator,
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir))
    counts = trainer.total_counts()
    trainer.save_state()
    trainer.save_model(args.output_dir)
    if args.should_save:
        print(f"The model is in {args.output_dir}; {counts['skipped_images']} samples were skipped for an unreadable image, "
              f"{counts['mismatched_conversations']} had no labels because their tokens did not add up.")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
