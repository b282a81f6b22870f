"""The embedded model and its benchmark: scenes of handwritten digits, questions about them, training."""

from libra.shadow import warn_if_llava_is_another

warn_if_llava_is_another()
