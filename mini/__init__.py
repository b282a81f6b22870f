"""The embedded model and its benchmark: scenes of handwritten digits, questions about them, training."""

from libra.cli import only_commands
from libra.shadow import warn_if_llava_is_another

only_commands("mini", "benchmark", "card", "finetune", "train")
warn_if_llava_is_another()
