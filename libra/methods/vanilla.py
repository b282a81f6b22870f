"""The plain model, which every table compares with."""

from .registry import Method

METHOD = Method(
    "vanilla",
    description="the plain model: nothing is compressed",
    section="Table 1, vanilla",
    places=(),
    compresses=False,
)
