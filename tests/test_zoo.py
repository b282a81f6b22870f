"""Every class of tests/zoo is built, runs and generates without compression; its tower sees the picture."""

import pytest
import torch
import zoo
from families import SAID

PATTERN = "t4 i t5"


@pytest.mark.slow  # the matrix builds and runs the same classes
@pytest.mark.parametrize("name", zoo.NAMES)
@torch.no_grad()
def test_a_class_is_built_and_runs(name):
    model = zoo.model(name)
    one, other = zoo.talk(name, PATTERN, 1), zoo.talk(name, "t2 i t3 i t7", 2)
    given = zoo.collate(name, [one])
    logits = model(**given).logits
    assert logits.isfinite().all()
    batch = zoo.collate(name, [one, other])
    together = model(**batch).logits[0, -len(one.ids) :]
    torch.testing.assert_close(together, logits[0], atol=1e-3, rtol=1e-3)
    assert model.generate(**batch, max_new_tokens=2, **SAID).shape[1] == batch["input_ids"].shape[1] + 2
    pixels = next(
        given_name for given_name in given if "pixel_values" in given_name or given_name == "image_patches"
    )
    given[pixels] = given[pixels].flip(-1) + 1
    assert not torch.equal(model(**given).logits, logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in zoo.NAMES if zoo.KINDS[name].video])
@torch.no_grad()
def test_a_class_takes_videos(name):
    model = zoo.model(name)
    given = zoo.collate(name, [zoo.talk(name, "t4 v t5", 1)])
    logits = model(**given).logits
    given["pixel_values_videos"] = given["pixel_values_videos"].flip(-1) + 1
    assert not torch.equal(model(**given).logits, logits)


def test_there_are_enough_of_them():
    assert len(zoo.KINDS) >= 60
