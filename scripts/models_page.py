"""Write docs/models.md, and the number of models in README.md, from what the tests know: python
scripts/models_page.py (a test compares them).

The names are those of libra/engine/families.py; what a class can do is asked of the tiny models of tests/zoo.
"""

import argparse
import os
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import transformers  # noqa: E402
import zoo  # noqa: E402
from methods_page import README, counted  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES  # noqa: E402

from libra.engine.families import TESTED  # noqa: E402
from libra.engine.masks import WITHOUT_SCORES, attention_kinds  # noqa: E402
from libra.engine.structure import earliest_place  # noqa: E402

PAGE = ROOT / "docs/models.md"
HEAD = """# Models of transformers

Written by `python scripts/models_page.py` from [families.py](../libra/engine/families.py) and the tiny models
of [tests/zoo](../tests/zoo), with transformers {version}; change those, not this page.

[libra.attach](plugin.md) takes the vision-language classes of transformers. What *tested* means: on a model
with random weights, a few layers and a real vision tower, for Libra-Merging, FastV, Turbo and PyramidDrop, in
float32 on a CPU ([test_matrix.py](../tests/test_matrix.py)): without compression and after `detach` no bit
differs; at ratio 0 no bit differs; a batch padded on the left gives what its samples give; decoding with the
cache gives what a pass without one gives; and what enters each layer is what a reference computes layer by
layer from the model's own eager run ([by_hand.py](../tests/by_hand.py)). SparseVLM and DART are tested in
the same way but for the last two, DART not on Gemma 3n, which it refuses. No real checkpoint of these classes
was run for this page.

## Tested: {tested}

| class | layers that can compress | videos |
|---|---|---|
"""
REFUSED = """
*Videos*: whether the tests give the tiny model videos as such. Some others take them too, or take them as
images.

## Refused: {refused}

`libra.attach` says the reason in one sentence, *libra.attach does not support CLASS: …*

| class | … |
|---|---|
"""
OTHERS = """
## Not tried

{others}. A class that is in no table is accepted with a warning where its structure is one that can be
compressed, and otherwise refused with the reason.
"""


def layers_of(name: str) -> str:
    """Which layers of a class can compress, in words."""
    config = zoo.decoder(zoo.model(name)).config
    others = sorted(WITHOUT_SCORES & set(attention_kinds(config)))
    found = f"those of attention, not {', '.join(f'`{kind}`' for kind in others)}" if others else "all"
    if earliest_place(zoo.model(name).config) >= 0:
        found += ", from the last at which visual features are added"
    if getattr(config, "num_kv_shared_layers", 0):
        found += ", before those whose keys later layers use again"
    return found


def tried_row(name: str) -> str:
    videos = "yes" if zoo.KINDS[name].video else ""
    return f"| {name} | {layers_of(name)} | {videos} |\n"


def page() -> str:
    names = {
        name
        for value in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()
        for name in (value if isinstance(value, (tuple, list)) else (value,))
    }
    others = sorted(names - set(TESTED) - set(zoo.REASONS))
    version = ".".join(transformers.__version__.split(".")[:2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tested = "".join(map(tried_row, sorted(TESTED)))
    refused = "".join(f"| {name} | {reason} |\n" for name, reason in sorted(zoo.REASONS.items()))
    return (
        HEAD.format(version=version, tested=len(TESTED))
        + tested
        + REFUSED.format(refused=len(zoo.REASONS))
        + refused
        + OTHERS.format(others=", ".join(others) or "None of this version's image-text-to-text classes")
    )


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.partition(":")[0] + ".").parse_args()
    PAGE.write_text(page(), encoding="utf-8")
    README.write_text(counted("models", len(TESTED)), encoding="utf-8")
