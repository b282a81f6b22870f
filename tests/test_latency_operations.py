"""How much a compression step queues and asks."""

import pytest
import torch

from libra import Compression
from libra.latency.bench import Bench, Prompt
from libra.latency.operations import Queued, of_prefill, queued
from libra.latency.paired import plain_layers
from libra.latency.random_weights import random_model
from libra.ops import dispatch
from libra.rows import ModelSpec
from libra.utils.timing import Moment, was_busy

SPEC = ModelSpec("tiny", 4, 128, 64, 128, (60,), "")
LAYERS = (0, 1, 2)
HALF = Compression(method="libra", layers=LAYERS, ratio=0.5, tau=0.2)
UNEVEN = Compression(method="libra", layers=LAYERS, ratio=0.55, tau=0.2)
RESERVED = Compression(method="libra", layers=LAYERS, ratio=0.5, compensation="reserved")
ALLOCATIONS = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
TWO_THIRDS = Compression(method="libra", layers=LAYERS, ratio=2 / 3, compensation="reserved")
ONE, RAGGED = Prompt(60, 16), Prompt(60, 16, 4, (1, 2, 0, 3))


@pytest.fixture(scope="module")
def model():
    return random_model(SPEC, SPEC.layers, torch.float32)


def launches(found: Queued) -> int:
    """Of kernels, Triton's and torch's own: what is allocated only launches none."""
    allocated = sum(found.operations[name] for name in ALLOCATIONS)
    return found.kernels.total() + found.operations.total() - allocated


def of_step(bench: Bench) -> dict[str, float]:
    """What the compression queues beyond the plain prefill, for each of its steps: ``operations``,
    ``launches``, ``kernels`` and ``questions``; the survey of the prompt is shared out among them."""
    plain, own = of_prefill(bench, False), of_prefill(bench, True)
    steps = len(bench.compression.schedule(bench.text.num_hidden_layers))
    counts = {
        "operations": own.operations.total() - plain.operations.total(),
        "launches": launches(own) - launches(plain),
        "kernels": own.kernels.total(),
        "questions": own.questions.total() - plain.questions.total(),
    }
    return {name: count / steps for name, count in counts.items()}


def test_what_counts():
    """Views do not, tables from the host do, and so does every way to bring a number there."""
    x = torch.ones(4, 6)
    with queued() as found:
        x.view(24)[2:].unflatten(0, (2, 11)).transpose(0, 1)
        (x + 1).sum()
        torch.tensor([1, 2])
        bool(x[0, 0] > 0), x.tolist(), x[1, 1].item(), x.cpu()
    assert found.operations == {"add": 1, "sum": 1, "lift_fresh": 1, "gt": 1, "_local_scalar_dense": 2}
    assert found.questions == {"__bool__": 1, "tolist": 1, "item": 1, "cpu": 1}


def test_a_plain_layer(model):
    """What a step is compared with: 38 operations a layer with a cache."""
    short = random_model(SPEC, 3, torch.float32)
    counts = [of_prefill(Bench(m, HALF, ONE), False).operations.total() for m in (model, short)]
    assert counts[0] - counts[1] == 38


@pytest.mark.parametrize("c, prompt, most", [
    (HALF, ONE, 60), (UNEVEN, ONE, 60), (RESERVED, ONE, 60), (HALF, RAGGED, 120), (TWO_THIRDS, RAGGED, 120),
], ids=["half", "uneven intervals", "reserved", "ragged", "reserved and ragged"])  # fmt: skip
def test_a_step_queues_little_and_asks_at_most_one_thing(model, c, prompt, most):
    """With torch's definitions; the survey of the prompt, which asks once, is in it."""
    counts = of_step(Bench(model, c, prompt))
    assert 20 < counts["operations"] <= most
    asked = 0 if c.reserves else len(LAYERS)
    assert counts["questions"] == (asked + 1 + (prompt is RAGGED)) / len(
        LAYERS
    )  # is the last column padding?


def test_fastv_queues_less(model):
    assert of_step(Bench(model, Compression(method="fastv", layers=(0, 1)), ONE))["operations"] <= 25


@pytest.mark.parametrize("c", [HALF, RESERVED], ids=["half", "reserved"])
def test_launches_with_kernels(model, c, monkeypatch):
    """In Triton's interpreter: the kernels, and together with what torch still does."""
    kernels = pytest.importorskip("libra.ops.kernels", reason="Triton is not installed")
    if not kernels.INTERPRETED:
        pytest.skip("kernels are compiled on this machine")
    bench = Bench(model, c, ONE)
    plain = of_step(bench)
    monkeypatch.setattr(dispatch, "runs_kernels", lambda tensor: True)
    counts = of_step(bench)
    assert 5 <= counts["kernels"] <= 20 and plain["kernels"] == 0
    assert counts["launches"] <= 20 < plain["launches"]


def test_a_busy_machine_is_noticed():
    """By wall and CPU time that disagree, on one thread and on two."""
    quiet = [Moment(1.0, 0.99), Moment(2.0, 1.98), Moment(1.0, 0.97)]
    assert not was_busy(quiet) and not was_busy([Moment(one.wall, 1.9 * one.cpu) for one in quiet])
    assert not was_busy([*quiet, Moment(3.0, 1.0)]) and not was_busy([])  # one disturbed run
    assert was_busy([Moment(1.0, 0.99), Moment(1.4, 0.99), Moment(1.5, 1.0)])
    assert was_busy([Moment(1.3, 1.0)] * 3)


def test_plain_layers_at_the_lengths_of_the_stages(model):
    found = plain_layers(Bench(model, HALF, ONE), 2)
    assert found["lengths"] == [60, 30, 15, 8] and len(found["seconds"]) == 4
    assert 0 < found["ratio"] < 5
