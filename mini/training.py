"""Both stages of the training; :mod:`mini.train` is the command.

Stage 1 (contrast) trains a small CLIP, which stands in for a pretrained one. Stage 2 (answering) trains
projector and language model on questions, with the tower frozen. A run that was interrupted goes on when it
is started again.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch
from torch import nn
from transformers import CLIPModel, Trainer, TrainerCallback, TrainingArguments

from libra.utils.files import new_folder, write_text
from llava.train.runs import last_checkpoint
from llava.train.trainer import save_llava

from .answering import Answerer, Questioned
from .build import build_clip, build_model, build_tokenizer, save_clip
from .contrast import Captioned, SmallClip
from .optimizer import build_optimizer
from .questions import LATE
from .shared_prefix import NAME as SHARED_PREFIX
from .validation import AnswerScores, TowerScores, Validate

PROCESSES = 2  # at most; one process takes two batches a step instead
TOWER_BATCH, BATCH = 16, 8  # images a process: the contrast is among 16
TOWER_LR, LR, MUON_LR, WEIGHT_DECAY = 1.5e-3, 1e-3, 0.008, 0.03
TOWER_WARMUP, WARMUP, EASY = 100, 100, 300  # steps


class Minutes(TrainerCallback):
    """Put the seconds spent into every log line, for the model card's curve; they go on after an
    interruption."""

    def on_train_begin(self, args, state, control, **kwargs):
        before = max((entry.get("seconds", 0.0) for entry in state.log_history), default=0.0)
        self.start = time.perf_counter() - before

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.log_history:
            state.log_history[-1]["seconds"] = round(time.perf_counter() - self.start, 1)


def training_arguments(
    folder: Path, options, steps: int, batch: int, lr: float, **schedule
) -> TrainingArguments:
    processes = int(os.environ.get("WORLD_SIZE", 1))
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=PROCESSES // processes,
        learning_rate=lr,
        **schedule,
        adam_beta2=0.98,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=1.0,
        seed=options.seed,
        bf16=True,
        use_cpu=True,
        ddp_backend="gloo" if processes > 1 else None,
        ddp_find_unused_parameters=False,
        # an image's place says how far the training is: scenes become harder
        train_sampling_strategy="sequential",
        dataloader_num_workers=0,
        remove_unused_columns=False,
        report_to="none",
        average_tokens_across_devices=False,
        logging_steps=25,
        save_steps=options.save_every,
        save_total_limit=2,
    )


def images_of(args: TrainingArguments) -> int:
    return args.max_steps * args.per_device_train_batch_size * PROCESSES


def run_stage(
    module: nn.Module, dataset, args: TrainingArguments, validate: Validate, optimizer=None
) -> list[dict]:
    """Train, or go on from the last checkpoint of an interrupted run; returns the log."""
    trainer = Trainer(
        model=module,
        args=args,
        train_dataset=dataset,
        callbacks=[Minutes(), validate],
        optimizers=(optimizer, None),
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir))
    return trainer.state.log_history


def compile_layers(*encoders) -> None:
    for encoder in encoders:
        for layer in encoder.layers:
            layer.compile(dynamic=False)


def train_tower(options, tokenizer, folder: Path, target: Path) -> None:
    """Stage 1, into ``target`` unless that is there."""
    args = training_arguments(
        folder,
        options,
        options.stage1_steps,
        TOWER_BATCH,
        TOWER_LR,
        warmup_steps=TOWER_WARMUP,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.02},
    )
    if not target.exists():
        clip = build_clip(tokenizer, options.seed)
        if options.compile:
            compile_layers(clip.vision_model.encoder)
        images = Captioned(images_of(args), options.seed, tokenizer)
        validate = Validate(TowerScores(tokenizer, options.validation), options.validate_every)
        log = run_stage(SmallClip(clip), images, args, validate)
        if args.should_save:
            write_text(folder / "log.json", json.dumps(log))
            with new_folder(target) as work:
                save_clip(clip, tokenizer, work)
    if args.world_size > 1:
        torch.distributed.barrier()


def train_answers(options, tokenizer, folder: Path, tower: Path, target: Path) -> None:
    """Stage 2: the finished model, with both of CLIP's towers, into ``target`` as float16."""
    steps = options.stage2_steps
    args = training_arguments(
        folder,
        options,
        steps,
        BATCH,
        LR,
        warmup_steps=WARMUP,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": round((1 - LATE) * steps), "min_lr_ratio": 0.02},
    )
    check_length(last_checkpoint(folder), steps)
    llava = build_model(tower, tokenizer, options.seed)
    llava.config._attn_implementation = (
        SHARED_PREFIX  # the decoder only: the tower has a configuration of its own
    )
    if options.compile:
        compile_layers(llava.model, llava.get_vision_tower().vision_tower.encoder)
    module = Answerer(llava, tokenizer)
    optimizer = build_optimizer(module, MUON_LR, LR, WEIGHT_DECAY)
    images = Questioned(images_of(args), options.seed, tokenizer, EASY * BATCH * PROCESSES)
    validate = Validate(AnswerScores(tokenizer, options.validation), options.validate_every)
    log = run_stage(module, images, args, validate, optimizer)
    if args.should_save:
        write_text(folder / "log.json", json.dumps(log))
        with new_folder(target) as work:
            save_llava(llava.half(), tokenizer, work)
            save_clip(CLIPModel.from_pretrained(tower).half(), tokenizer, work / "vision_tower")


def check_settings(options, work: Path) -> None:
    """Refuse to go on with another run's files. Raises SystemExit."""
    settings = {"seed": options.seed, "stage1_steps": options.stage1_steps}
    path = work / "settings.json"
    if path.exists() and (old := json.loads(path.read_text())) != settings:
        sys.exit(
            f"error: {options.output} holds a run with {old}, not {settings}: name another --output, or"
            " delete it"
        )
    write_text(path, json.dumps(settings))


def check_length(checkpoint: str | None, steps: int) -> None:
    """Refuse to change stage 2's length in its last third, which depends on the length. Raises SystemExit."""
    if checkpoint is None:
        return
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
    done, planned = state["global_step"], state["max_steps"]
    if steps != planned and done > LATE * min(steps, planned):
        sys.exit(
            f"error: stage 2 was planned for {planned} steps and did {done}: it is too late for"
            f" --stage2-steps {steps}"
        )


def train(options: argparse.Namespace) -> None:
    """Both stages, by the options of :mod:`mini.train`; what an interrupted run finished is kept."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes > PROCESSES:
        sys.exit(
            f"error: train with one or two processes, not {processes}: the recipe's batches are shared by two"
        )
    torch.set_flush_denormal(True)
    work = options.output / "work"
    check_settings(options, work)
    tokenizer = build_tokenizer()
    train_tower(options, tokenizer, work / "stage1", work / "clip")
    train_answers(options, tokenizer, work / "stage2", work / "clip", options.output / "checkpoint")
