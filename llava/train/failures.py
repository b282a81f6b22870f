"""What ends a training in the middle, in a sentence: a full disk or too little memory."""

import errno
import re

import torch
from safetensors import SafetensorError

from libra.utils.sentences import first_line

from .arguments import TrainingArguments
from .runs import Run

# torch and safetensors have no exceptions of their own for these.
_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|DataLoader worker .*killed by signal: Killed"
)
_WRITING = re.compile(
    r"PytorchStreamWriter|inline_container|file write failed|No space left|os error 28|Disk quota"
)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def sentence_of(error: Exception, run: Run, args: TrainingArguments) -> str | None:
    """What to tell a user, with how to go on; None for an error that nobody foresaw, which needs its
    traceback."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or _is(error, _MEMORY):
        return (
            "there is not enough memory for --per_device_train_batch_size "
            f"{args.per_device_train_batch_size} ({first_line(error)}); take a smaller one with more "
            f"--gradient_accumulation_steps, or --gradient_checkpointing True; {how_to_go_on(run)}"
        )
    if isinstance(error, (OSError, SafetensorError)) or _is(error, _WRITING):
        full = getattr(error, "errno", None) in _FULL or _is(error, _WRITING)
        what = f"{run.folder} cannot be written to" if full else "a file cannot be read or written"
        return f"{what} ({first_line(error)}); when that is mended {how_to_go_on(run)}"
    return None


def _is(error: Exception, pattern: re.Pattern) -> bool:
    return isinstance(error, (RuntimeError, SafetensorError)) and pattern.search(str(error)) is not None


def how_to_go_on(run: Run) -> str:
    """What the same command does when it is called again."""
    newest = run.newest()
    if newest is None:
        return "no checkpoint was written yet, so the same command begins anew"
    return f"the same command goes on from {newest}"
