"""Tiny random models of the vision-language classes of transformers, each with a real tower."""

from functools import cache

import families
import torch
import transformers

from . import grids, others, tiles

KINDS = {**families.KINDS, **tiles.KINDS, **grids.KINDS, **others.KINDS}
NAMES = sorted(name for name in KINDS if hasattr(transformers, name))  # a version may lack some
EAGER = ("GotOcr2ForConditionalGeneration", "Inkling2ForConditionalGeneration")  # have no other attention


def own_model(name: str, attention: str = "sdpa", seed: int = 0):
    return families.make(KINDS[name], name, "", "eager" if name in EAGER else attention, seed)


model = cache(own_model)  # shared: leave it as it is


def talk(name: str, pattern: str, seed: int) -> families.Talk:
    return families.talk_of(KINDS[name], pattern, seed)


def collate(
    name: str, talks: list[families.Talk], side: str = "left", labels: bool = False
) -> dict[str, torch.Tensor]:
    return families.batch_of(KINDS[name], talks, side, labels)
