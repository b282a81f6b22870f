"""The reference of tests/by_hand.py against the one of tests/families.py, which knows eight classes."""

import families
import pytest
import torch
import zoo
from by_hand import by_hand

from libra import Compression

TWO_PLACES = Compression(method="libra", layers=(1, 3), ratio=0.5, tau=0.9)
METHODS = [
    TWO_PLACES,
    Compression(method="fastv", layers=(2,), ratio=0.5),
    Compression(method="pyramiddrop", layers=(1, 3), ratio=0.5, positions="original"),
]


@pytest.mark.parametrize("name", families.KINDS)
@torch.no_grad()
def test_two_references_agree(name):
    twin, t = families.own_model(name, attention="eager"), families.talk(name, "t4 i t2 v t5", 1)
    for c in METHODS:
        one, other = by_hand(twin, name, t, c), families.by_hand(twin, name, t, c)
        assert one.source == other.source
        assert None in one.source or c.merge == "drop"
        torch.testing.assert_close(one.logits, other.logits, atol=2e-5, rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in zoo.NAMES if name not in zoo.REASONS])
@torch.no_grad()
def test_without_compression_it_is_the_models_own_run(name):
    """Layer by layer, windows and masks included."""
    twin, t = zoo.own_model(name, "eager"), zoo.talk(name, "t4 i i t5", 1)
    logits = twin(**zoo.collate(name, [t])).logits[0]
    c = Compression(method="fastv", layers=zoo.places(name)[:1], ratio=0.0)
    got = by_hand(twin, name, t, c)
    assert got.source == list(range(len(t.ids)))
    torch.testing.assert_close(got.logits, logits, atol=1e-4, rtol=1e-4)
