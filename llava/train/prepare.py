"""What a training begins with: everything that can be wrong is found here, before weights are read."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from libra import Compression
from libra.rows import compression_from, patches_across

from ..constants import IGNORE_INDEX
from .arguments import DataArguments, ModelArguments, TrainingArguments
from .data import Collator, LazySupervisedDataset, VisualTokens
from .initial import Start, find_start, picture_settings
from .labels import training_template
from .outcomes import Outcome
from .runs import Run, digest_of, digest_of_model
from .samples import Data, check_files, check_for_model, read_bytes, read_data

TRIED = 1000  # samples of which one has to keep a label before weights are read
# The flags that the weights depend on. What is different in speed or memory only may change when a run goes
# on.
FLAGS = (
    "version",
    "tune_mm_mlp_adapter",
    "freeze_backbone",
    "freeze_mm_mlp_adapter",
    "unfreeze_mm_vision_tower",
    "mm_use_im_start_end",
    "mm_use_im_patch_token",
    "bits",
    "double_quant",
    "quant_type",
    "lora_enable",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_bias",
    "learning_rate",
    "mm_projector_lr",
    "mm_vision_tower_lr",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "max_steps",
    "num_train_epochs",
    "optim",
    "optim_args",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "average_tokens_across_devices",
    "seed",
    "data_seed",
    "bf16",
    "fp16",
    "model_max_length",
    "group_by_modality_length",
    "dataloader_drop_last",
)
SETTINGS = (
    "mm_projector_type",
    "mm_vision_select_layer",
    "mm_vision_select_feature",
    "mm_patch_merge_type",
    "image_aspect_ratio",
    "image_grid_pinpoints",
    "num_frames",
)


@dataclass
class Prepared:
    """All that is known of a training before weights are read."""

    start: Start
    data: Data
    dataset: LazySupervisedDataset
    collator: Collator
    compression: Compression | None
    run: Run


def prepare(model: ModelArguments, data: DataArguments, training: TrainingArguments) -> Prepared:
    """Look at flags, data, files, configurations and file headers.

    Raises:
        ValueError: one sentence on what is wrong.
    """
    compression = None if model.compression is None else compression_from(model.compression)
    if (
        compression is not None
        and compression.score_layer == "next"
        and (is_deepspeed_zero3_enabled() or training.fsdp)
    ):
        raise ValueError(
            "score_layer: next runs a layer out of turn, which ZeRO-3 and FSDP cannot follow; use ZeRO-2"
        )
    content, videos = read_bytes(data.data_path), data.video_folder or data.image_folder
    found = read_data(data.data_path, content, training_template(model.version) if model.version else None)
    check_files(found, "image", data.image_folder)
    start = find_start(model, data, training, compression)
    check_for_model(found, start.takes_videos)
    check_files(found, "video", videos)
    template = training_template(start.version)
    if template is None and not start.tokenizer.chat_template:
        raise ValueError(
            f"--version {start.version} needs a tokenizer with a chat template; {start.folder} has none"
        )
    collator = make_collator(start)
    dataset = LazySupervisedDataset(
        found.samples,
        start.tokenizer,
        template,
        start.image_processor,
        picture_settings(start.config),
        data.image_folder,
        videos,
        start.limit,
        start.config.num_frames if start.takes_videos else None,
        start.config.mm_use_im_start_end,
        collator.visual_tokens,
    )
    check_labels(dataset, collator, data.data_path, start.version)
    if Path(training.output_dir).resolve() == start.folder.resolve():
        raise ValueError(
            f"--output_dir {training.output_dir} is the model that the training begins with; name another"
            " folder"
        )
    run = Run(Path(training.output_dir), identity_of(start, digest_of(content), model, training))
    return Prepared(start, found, dataset, collator, compression, run)


def identity_of(
    start: Start, data: str, model: ModelArguments, training: TrainingArguments
) -> dict[str, object]:
    """What the weights of a training depend on, under the names of the flags. Images and videos are not part
    of it."""
    projector, config = model.pretrain_mm_mlp_adapter, start.config
    sharded = (
        "ZeRO-3"
        if is_deepspeed_zero3_enabled()
        else "ZeRO"
        if training.deepspeed
        else "FSDP"
        if training.fsdp
        else None
    )
    rows = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    flags = {f"--{name}": _plain(getattr(model, name, getattr(training, name, None))) for name in FLAGS}
    return (
        flags
        | {f"--{name}": _plain(getattr(config, name, None)) for name in SETTINGS}
        | {
            "--data_path": data,
            "--model_name_or_path": digest_of_model(start.folder),
            "--vision_tower": digest_of_model(Path(config.mm_vision_tower)),
            "--pretrain_mm_mlp_adapter": None
            if projector is None
            else digest_of(Path(projector).read_bytes()),
            "--compression": getattr(config, "trained_with_compression", None) if model.compression else None,
            "--version": start.version,
            "--model_max_length": start.limit,
            "samples of a step (batch size × accumulation × processes)": rows,
            "sharding (--deepspeed, --fsdp)": f"{sharded} on {training.world_size} processes"
            if sharded
            else None,
        }
    )


def _plain(value) -> object:
    """A flag's value as JSON has it; what an enumeration stands for is its word."""
    return getattr(value, "value", value)


def make_collator(start: Start) -> Collator:
    """The collator that cuts where the model would."""
    counts = None
    if not start.takes_videos:  # whose length counts only text
        config, tower = start.config, start.tower
        patches = patches_across(tower) ** 2 + (config.mm_vision_select_feature == "cls_patch")
        pinpoints = getattr(config, "image_grid_pinpoints", None)
        counts = VisualTokens(patches, tower.image_size, config.mm_patch_merge_type, pinpoints)
    return Collator(start.tokenizer.pad_token_id, start.limit, start.model_class.placeholders, counts)


def check_labels(dataset: LazySupervisedDataset, collator: Collator, path: str, version: str) -> None:
    """Look for a sample that something would be learned from.

    Raises:
        ValueError: if none of up to TRIED samples, chosen at random, keeps a label.
    """
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()[:TRIED]
    found: Counter[Outcome] = Counter()
    unreadable = ""
    for place in tqdm(order, desc="looking for labels", unit=" samples", delay=5):
        encoded = dataset.encoded(place)
        if not bool((encoded.labels != IGNORE_INDEX).any()):  # there is no need to look at its images
            found[Outcome.BEHIND if encoded.cut and not encoded.mismatch else Outcome.MISMATCHED] += 1
            continue
        sample = dataset[place]
        outcome = collator.outcome(sample)
        if outcome >= Outcome.CUT:
            return
        found[outcome] += 1
        unreadable = unreadable or sample["unreadable"]
    sentences = {
        Outcome.BEHIND: f"in {found[Outcome.BEHIND]} every answer comes after --model_max_length "
        f"{collator.limit}; raise it",
        Outcome.MISMATCHED: f"in {found[Outcome.MISMATCHED]} the tokens do not add up with --version "
        f"{version}; take another",
        Outcome.UNREADABLE: f"in {found[Outcome.UNREADABLE]} {unreadable}",
    }
    told = ", ".join(sentences[outcome] for outcome, _ in found.most_common())
    raise ValueError(f"nothing would be learned from {path}: of {len(order)} samples {told}")
