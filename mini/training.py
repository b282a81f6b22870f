"""Both stages of the embedded model's training; :mod:`mini.train` is the command.

Stage 1 teaches the vision tower to name the digit and colour on each patch (it stands in for a pretrained
CLIP). Stage 2 trains everything on questions; a fading copy of stage 1's loss on the projector's output keeps
the projector from collapsing.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from libra.mini.scenes import COLOR_NAMES, NO_DIGIT
from libra.utils.files import write_text
from llava.constants import IGNORE_INDEX
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.train.runs import last_checkpoint
from llava.train.shared_prefix import NAME as SHARED_PREFIX
from llava.train.trainer import save_llava

from .build import WIDTH, build_model, build_tokenizer, build_vision_tower
from .data import PREFIX, TEXT_LENGTH, TEXTS_PER_IMAGE, ImageTexts, SceneLabels


class PatchLabels(nn.Module):
    """Two linear heads on visual tokens (B, N, WIDTH): the digit and the colour on each patch."""

    def __init__(self):
        super().__init__()
        self.digit = nn.Linear(WIDTH, 10)
        self.color = nn.Linear(WIDTH, len(COLOR_NAMES) + 1)

    def forward(self, tokens, digit_labels, color_labels) -> torch.Tensor:
        shown = digit_labels.masked_fill(digit_labels == NO_DIGIT, IGNORE_INDEX)
        return self._loss(self.digit(tokens), shown) + 0.5 * self._loss(self.color(tokens), color_labels)

    @staticmethod
    def _loss(logits, labels) -> torch.Tensor:
        """Mean over the labelled patches; 0 where a batch has none (only easy-VQA images)."""
        total = F.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), reduction="sum", ignore_index=IGNORE_INDEX
        )
        return total / (labels != IGNORE_INDEX).sum().clamp(min=1)


def train_tower(tower: CLIPVisionTower) -> CLIPVisionTower:
    """Make a tower trainable but for its final norm, which lies behind the selected layer: DDP would wait for
    its gradient."""
    tower.requires_grad_(True)
    for name, parameter in tower.named_parameters():
        if "post_layernorm" in name:
            parameter.requires_grad_(False)
    return tower


class TowerWithLabels(nn.Module):
    """Stage 1: vision tower and patch heads."""

    def __init__(self, tower: CLIPVisionTower):
        super().__init__()
        self.tower, self.heads = train_tower(tower), PatchLabels()

    def forward(self, images, digit_labels, color_labels):
        return {"loss": self.heads(self.tower(images), digit_labels, color_labels)}


class LlavaWithLabels(nn.Module):
    """Stage 2: the LLaVA model on many texts per image, with patch heads on the projected visual tokens."""

    def __init__(self, llava, tokenizer):
        super().__init__()
        self.llava, self.heads = llava, PatchLabels()
        train_tower(llava.get_vision_tower())
        self.register_buffer("prefix", torch.tensor(tokenizer(PREFIX).input_ids), persistent=False)
        self.aux_weight = 0.0

    def forward(self, images, input_ids, labels, digit_labels, color_labels):
        embed = self.llava.get_input_embeddings()
        visual = self.llava.encode_images(images)
        head = embed(self.prefix).expand(len(images), -1, -1)
        prefix_length = head.shape[1] + visual.shape[1]
        positions = torch.cat(
            [
                torch.arange(prefix_length),
                (prefix_length + torch.arange(TEXT_LENGTH)).repeat(TEXTS_PER_IMAGE),
            ]
        )
        hidden = self.llava.model(
            inputs_embeds=torch.cat([head, visual, embed(input_ids)], 1),
            position_ids=positions[None].expand(len(images), -1),
            use_cache=False,
            text_length=TEXT_LENGTH,
            prefix_length=prefix_length,
        ).last_hidden_state
        answers = labels != IGNORE_INDEX
        logits = self.llava.lm_head(hidden[:, prefix_length:][answers]).float()
        loss = F.cross_entropy(logits, labels[answers])
        # The same modules take part in every step, or DDP would wait for gradients that never come.
        return {"loss": loss + self.aux_weight * self.heads(visual, digit_labels, color_labels)}


class FadeAuxiliaryLoss(TrainerCallback):
    """The patch loss counts half for the first third, then fades to nothing."""

    def on_step_begin(self, args, state, control, model, **kwargs):
        model.aux_weight = 0.5 * min(1.0, 1.5 * (1 - state.global_step / state.max_steps))


def training_arguments(folder: Path, steps: int, batch: int, lr: float, seed: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=lr,
        seed=seed,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.02},
        warmup_steps=max(1, steps // 25),
        adam_beta2=0.98,
        weight_decay=0.03,
        max_grad_norm=1.0,
        bf16=True,
        use_cpu=True,
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
        ddp_find_unused_parameters=False,
        dataloader_num_workers=0,
        remove_unused_columns=False,
        report_to="none",
        average_tokens_across_devices=False,
        logging_steps=25,
        save_steps=250,
        save_total_limit=1,
    )


class Minutes(TrainerCallback):
    """Put the seconds spent into every log line, for the model card's curve."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.log_history:
            state.log_history[-1]["seconds"] = round(time.perf_counter() - self.start, 1)


def run_stage(module: nn.Module, dataset, args: TrainingArguments, callbacks=()) -> list[dict]:
    """Train, or go on from the last checkpoint of an interrupted run; returns the log."""
    trainer = Trainer(model=module, args=args, train_dataset=dataset, callbacks=[Minutes(), *callbacks])
    trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir))
    return trainer.state.log_history


def train(options: argparse.Namespace) -> None:
    """Both stages, by the options of :mod:`mini.train`; what an interrupted run finished is kept."""
    torch.set_flush_denormal(True)

    work = options.output / "work"
    stage1 = training_arguments(
        work / "stage1", options.stage1_steps, 2 * options.batch, 1.5e-3, options.seed
    )
    stage2 = training_arguments(work / "stage2", options.stage2_steps, options.batch, 1.2e-3, options.seed)
    tower_folder = work / "tower"
    tokenizer = build_tokenizer()
    processes = stage1.world_size

    with stage1.main_process_first():
        if not (tower_folder / "untrained").exists():
            build_vision_tower(tower_folder / "untrained", options.seed)
    trained_tower, history = tower_folder / "stage1", work / "log.json"
    select = argparse.Namespace(mm_vision_select_layer=-1)
    if not (trained_tower / "config.json").exists():
        tower = CLIPVisionTower(str(tower_folder / "untrained"), select)
        images = SceneLabels(
            options.stage1_steps * 2 * options.batch * processes, options.seed, tower.image_processor
        )
        log = run_stage(TowerWithLabels(tower), images, stage1)
        if stage1.should_save:
            write_text(history, json.dumps({"stage1": log}))
            tower.image_processor.save_pretrained(trained_tower)
            tower.vision_tower.save_pretrained(trained_tower)
    if processes > 1:
        torch.distributed.barrier()

    llava = build_model(trained_tower, tokenizer, options.seed)
    llava.config._attn_implementation = (
        SHARED_PREFIX  # the decoder only: the tower has a configuration of its own
    )
    for layer in (
        [*llava.model.layers, *llava.get_vision_tower().vision_tower.encoder.layers]
        if options.compile
        else []
    ):
        layer.compile(dynamic=False)
    module = LlavaWithLabels(llava, tokenizer)
    size, processor = (
        options.stage2_steps * options.batch * processes,
        llava.get_vision_tower().image_processor,
    )
    texts = ImageTexts(size, options.seed + 1_000_000, processor, tokenizer)
    log = run_stage(module, texts, stage2, [FadeAuxiliaryLoss()])
    if stage2.should_save:
        logs = json.loads(history.read_text()) if history.exists() else {}
        write_text(history, json.dumps({**logs, "stage2": log}))
        save_llava(llava.half(), tokenizer, options.output)
