"""A training run from its arguments to the finished model."""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from transformers import set_seed

from libra.utils.files import flush_folder, flush_tree

from .arguments import TrainingArguments, exit_with, parse
from .failures import how_to_go_on, sentence_of
from .initial import build_model
from .outcomes import Tally, announce
from .prepare import Prepared, prepare
from .runs import Run
from .trainer import LlavaTrainer

STAGE = ".finished.tmp"  # where the finished model is written before it takes its place


def train(argv: list[str]) -> None:
    """Train as the command line says; what is wrong with it, or goes wrong, ends the program with a
    sentence."""
    model_args, data_args, args = parse(argv)
    try:
        prepared = prepare(model_args, data_args, args)
        if args.check_only:
            tell(args, "flags, data, files and headers are fine; leave out --check_only to train")
            return
        finished = prepared.run.check()
    except (ValueError, ImportError) as error:
        exit_with(" ".join(str(error).split()))
    if finished:
        tell(args, f"nothing is left to do: the run in {args.output_dir} is finished")
    else:
        with foreseen(prepared.run, args):
            set_seed(args.seed)  # a new projector begins alike in every process
            try:
                model = build_model(prepared.start, model_args, args)
            except (ValueError, ImportError) as error:
                exit_with(" ".join(str(error).split()))
            run_training(prepared, model, args)
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def foreseen(run: Run, args: TrainingArguments) -> Iterator[None]:
    """A full disk, too little memory and Ctrl-C end the program with a sentence; other errors keep their
    traceback."""
    try:
        yield
    except KeyboardInterrupt:
        tell(args, f"stopped; {how_to_go_on(run)}")
        raise SystemExit(130) from None
    except Exception as error:
        sentence = sentence_of(error, run, args)
        if sentence is None:
            raise
        remove_unfinished(run, args)
        exit_with(sentence, 1)


def run_training(prepared: Prepared, model, args: TrainingArguments) -> None:
    """Train a built model, from the newest whole checkpoint of its run on, and write what it has become."""
    llava, run = model.get_base_model() if args.lora_enable else model, prepared.run
    if not llava.config.unfreeze_mm_vision_tower:  # a tuned tower is no longer a part of its CLIP
        llava.name_clip(llava.get_vision_tower().vision_tower_name, prepared.start.tokenizer)
    llava.set_compression(prepared.compression)
    trainer = LlavaTrainer(
        model=model,
        args=args,
        train_dataset=prepared.dataset,
        processing_class=prepared.start.tokenizer,
        data_collator=prepared.collator,
        run=run,
        tally=Tally(prepared.data, args.device),
    )
    checkpoint = begin(run, args)
    if checkpoint is not None:
        trainer.tally.load(checkpoint)
    for line in announce(prepared.data):
        tell(args, line)
    if args.should_save:
        trainer.tally.write_report(run.folder)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.tally.share()
    summary = trainer.tally.sentence(prepared.start.limit)
    trainer.save_state()
    save_finished(trainer, run)
    if args.should_save:
        trainer.tally.write_report(run.folder)
        run.write(finished=True)
        print(f"The model is in {args.output_dir}. {summary}.")


def begin(run: Run, args: TrainingArguments) -> Path | None:
    """Make the folder a run's own and find the checkpoint to go on from; checkpoints that were torn go."""
    newest = run.newest()
    for path in run.torn():
        tell(args, f"{path} was not written to its end and is removed")
    remove_unfinished(run, args)
    if newest is not None:
        tell(args, f"the run goes on from {newest}")
    if args.should_save:
        run.write()
    return newest


def remove_unfinished(run: Run, args: TrainingArguments) -> None:
    if args.should_save:
        for path in (*run.torn(), run.folder / STAGE):
            shutil.rmtree(path, ignore_errors=True)


def save_finished(trainer: LlavaTrainer, run: Run) -> None:
    """Write the finished model next to its place, then move it there, config.json last: nobody loads one half
    of a model."""
    stage = run.folder / STAGE
    trainer.save_model(str(stage))
    if not trainer.args.should_save:
        return
    flush_tree(stage)
    for path in sorted(stage.iterdir(), key=lambda path: path.name == "config.json"):
        target = run.folder / path.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(path, target)
    flush_folder(run.folder)
    stage.rmdir()


def tell(args: TrainingArguments, sentence: str) -> None:
    """One line on stderr, by the first process."""
    if args.should_save:
        print(f"note: {sentence}", file=sys.stderr)
