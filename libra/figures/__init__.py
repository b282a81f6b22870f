"""The paper's Figures 1 and 2 of a real prefill, on its image: python -m libra.figures --model PATH --image
FILE …"""

from ..utils.lazy import lazily

__all__ = ["blocks_of", "main", "trace_image"]

__getattr__ = lazily(__name__, {"blocks_of": "prefill", "main": "command", "trace_image": "prefill"})
