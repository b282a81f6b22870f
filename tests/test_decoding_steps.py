"""What an attached compression costs a decoding step, counted, and calls of several threads at once."""

import threading
from collections import Counter

import families
import pytest
import torch
from families import SAID, collate, talk
from torch.utils._python_dispatch import TorchDispatchMode

import libra
from libra import Compression
from libra.engine.transformers_api import cache_argument, cache_of

LIBRA = Compression(method="libra", layers=(1, 3), tau=0.6)
STAGES = 3
LLAVA = "LlavaForConditionalGeneration"
every_family = pytest.mark.parametrize(
    "family", families.KINDS, ids=lambda value: value.replace("ForConditionalGeneration", "")
)


class Operations(TorchDispatchMode):
    """Counts every tensor operation that runs inside the block."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def operations_of_a_step(model, family: str, given: dict) -> Counter:
    """Of the second step after a prefill, as generate makes it: with a mask for all that came before."""
    out = model(**given, use_cache=True)
    mask, batch = given["attention_mask"], len(given["attention_mask"])
    for _ in range(2):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        positions = mask.sum(1, keepdim=True) - 1
        step = {
            "input_ids": torch.full((batch, 1), 5),
            "attention_mask": mask,
            "position_ids": positions.expand(3, -1, -1) if family.startswith("Qwen") else positions,
        }
        with Operations() as seen:
            model(**step, **cache_argument(cache_of(out)), use_cache=True)
    return seen.counts


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@every_family
def test_a_step_of_an_unpadded_batch_does_nothing_more(family, attention):
    """Not one tensor operation: what the model does by itself is all."""
    model = families.model(family, "", attention)
    one = collate(family, [talk(family, "t2 v t3 i t4", 1)])
    plain = operations_of_a_step(model, family, one)
    with libra.attach(model, LIBRA):
        compressed = operations_of_a_step(model, family, one)
    assert not compressed - plain and plain


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@every_family
def test_a_step_of_a_padded_batch_does_little_more(family, attention):
    """At most four operations a stage, whatever the batch is."""
    model = families.model(family, "", attention)
    talks = [talk(family, "t2 v t3 i t4", 1), talk(family, "t4 i t5", 2), talk(family, "t6", 3)]
    given = collate(family, talks)
    plain = operations_of_a_step(model, family, given)
    with libra.attach(model, LIBRA):
        compressed = operations_of_a_step(model, family, given)
    assert 0 < (compressed - plain).total() <= 4 * STAGES, compressed - plain


@torch.no_grad()
def rounds_of_two_threads(rounds: int) -> list:
    """One thread decodes while another one prefills, on one attached model; what came out wrong."""
    model, wrong, gate = families.model(LLAVA), [], threading.Barrier(2)
    chat, batch = (
        collate(LLAVA, [talk(LLAVA, "t2 i t3 i t4", 1)]),
        [
            collate(LLAVA, [talk(LLAVA, pattern, seed) for seed, pattern in enumerate(patterns)])
            for patterns in (("t4 i t5", "t6"), ("t1 i i t2",), ("t9", "t3 i t1", "t2 i t8"))
        ],
    )
    options = dict(max_new_tokens=4, **SAID)
    with libra.attach(model, LIBRA):
        said = model.generate(**chat, **options)
        logits = [model(**given).logits for given in batch]

        def decode():
            with torch.no_grad():
                for _ in range(rounds):
                    gate.wait(60)
                    if not torch.equal(model.generate(**chat, **options), said):
                        wrong.append("decoding")

        def prefill():
            with torch.no_grad():
                for number in range(rounds):
                    gate.wait(60)
                    for given, want in zip(batch, logits):
                        if not torch.equal(model(**given).logits, want):
                            wrong.append(number)

        threads = [threading.Thread(target=work) for work in (decode, prefill)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return wrong


def test_one_thread_decodes_while_another_prefills():
    assert rounds_of_two_threads(20) == []


@pytest.mark.slow
def test_one_thread_decodes_while_another_prefills_two_hundred_times():
    assert rounds_of_two_threads(200) == []


@torch.no_grad()
def test_a_decoder_that_is_called_by_itself():
    """It brings no visual tokens: a step after a compressed prefill counts on, and nothing is left behind."""
    model = families.model(LLAVA)
    given = collate(LLAVA, [talk(LLAVA, "t2 i t3", 1)])
    step = torch.tensor([[5]])
    with libra.attach(model, LIBRA):
        want = model(step, **cache_argument(cache_of(model(**given, use_cache=True)))).logits
        cache = cache_of(model(**given, use_cache=True))
        decoder = model.model.language_model
        hidden = decoder(step, **cache_argument(cache), use_cache=True).last_hidden_state
        assert torch.equal(model.lm_head(hidden), want)
        assert model(**given).logits.shape[1] < given["input_ids"].shape[1]
