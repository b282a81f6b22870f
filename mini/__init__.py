"""The embedded model's training; the questions that it is measured by are in :mod:`libra.mini`."""

from libra.utils.cli import only_commands
from libra.utils.other_llava import warn_if_llava_is_another

only_commands("mini", "background", "card", "finetune", "hello", "look", "pace", "train")
warn_if_llava_is_another()
