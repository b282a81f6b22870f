"""Compression's own time by part, and the bytes that it allocates: what is seen, what is not, and that it is
the same twice."""

import dataclasses
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode

from libra import merge
from libra.config import Compression
from libra.latency import Bench, Prompt
from libra.latency.memory import LiveBytes, Region
from libra.latency.parts import PARTS, profile_parts, seconds_by_part
from libra.latency.random_weights import random_model
from libra.rows import ModelSpec
from libra.utils.ranges import profiled

CPU = torch.device("cpu")
SPEC = ModelSpec(
    name="narrow",
    layers=4,
    hidden_size=256,
    intermediate_size=512,
    kv_size=256,
    visual_tokens=(64,),
    checkpoint="",
)


class Ranges(TorchDispatchMode):
    """Follows compression's own ranges, which may not lie within one another."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.profiler._record_function_enter_new.default:
            name = args[0]
            inside = [outer for outer in self.open if outer.startswith("libra.")]
            assert not (name.startswith("libra.") and inside), f"{name} begins inside {inside}"
            self.open.append(name)
            self.seen.add(name)
        elif operation is torch.ops.profiler._record_function_exit._RecordFunction:
            self.open.pop()
        return operation(*args, **(kwargs or {}))


def bench(method: str = "libra", layers=(0, 2), **keys) -> Bench:
    model = random_model(SPEC, SPEC.layers, torch.float32)
    return Bench(
        model,
        Compression(method=method, layers=layers, ratio=0.5, **keys),
        Prompt(visual=64, text=10, batch=2),
    )


def test_the_prefill_marks_every_part():
    found = profile_parts(bench(), runs=2)
    missing = [f"libra.{part}" for part in PARTS if part not in found["seconds"]]
    assert not missing, f"the compressed prefill has no record_function range named {', '.join(missing)}"
    assert all(seconds > 0 for seconds in found["seconds"].values()) and list(found["seconds"]) == list(PARTS)
    assert sum(found["seconds"].values()) == pytest.approx(found["sum"])  # of two runs the median is the mean
    assert 0 < found["share"] < 1 and sum(found["shares"].values()) == pytest.approx(found["share"])
    assert "host_seconds" not in found


@pytest.mark.parametrize(
    "method, layers, keys",
    [
        ("libra", (0, 2), {}),
        ("fastv", (1,), {}),
        ("turbo", (1,), {}),
        ("pyramiddrop", (1, 2), {}),
        ("libra", (3,), {}),
    ],
)
def test_ranges_do_not_lie_in_one_another(method, layers, keys):
    """Their seconds are added up."""
    made, watched = bench(method, layers, **keys), Ranges()
    with made.mode(True), watched:
        made.prefill()
    assert watched.seen and not watched.open


def test_a_prefill_that_nobody_watches_opens_no_range():
    """A range costs as much as several small operations."""
    assert isinstance(profiled("libra.mine"), nullcontext)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        with profiled("libra.mine"):
            torch.ones(1)
    assert "libra.mine" in [event.key for event in profile.key_averages()]
    assert isinstance(profiled("libra.mine"), nullcontext)


def test_a_prefill_without_ranges_is_no_measurement(monkeypatch):
    made = bench()
    monkeypatch.setattr("libra.latency.parts.PARTS", {"nonsense": "nonsense"})
    with pytest.raises(ValueError, match="marks none of the ranges libra.nonsense"):
        profile_parts(made, runs=1)


def event(name: str, where: DeviceType, start: float, end: float, kernels: float = 0.0) -> SimpleNamespace:
    times = SimpleNamespace(elapsed_us=lambda: end - start)
    return SimpleNamespace(name=name, device_type=where, time_range=times, device_time_total=kernels)


def test_a_part_is_summed_over_the_layers():
    host = [
        event("libra.merge", DeviceType.CPU, 0, 5),
        event("aten::mm", DeviceType.CPU, 1, 4),
        event("libra.merge", DeviceType.CPU, 20, 27),
        event("libra.unheard-of", DeviceType.CPU, 0, 90),
    ]
    assert seconds_by_part(host, on_device=False) == {"merge": pytest.approx(12e-6)}


def test_on_a_gpu_a_part_lasts_as_long_as_its_kernels():
    """By the span that the profiler lays over them, or, where it has none, by their own time."""
    events = [
        event("libra.merge", DeviceType.CPU, 0, 5, kernels=30),
        event("libra.merge", DeviceType.CUDA, 100, 140),
        event("libra.gather", DeviceType.CPU, 6, 9, kernels=8),
        event("gather_kernel", DeviceType.CUDA, 150, 158),
    ]
    assert seconds_by_part(events, on_device=True) == {
        "merge": pytest.approx(40e-6),
        "gather": pytest.approx(8e-6),
    }
    assert seconds_by_part(events, on_device=False) == {
        "merge": pytest.approx(5e-6),
        "gather": pytest.approx(3e-6),
    }


@pytest.mark.gpu
def test_parts_on_a_gpu():
    model = random_model(SPEC, SPEC.layers, torch.bfloat16, "cuda")
    made = Bench(
        model, Compression(method="libra", layers=(0, 2), ratio=0.5), Prompt(visual=64, text=10, batch=2)
    )
    made.run(True)
    found = profile_parts(made, runs=3)
    assert list(found["seconds"]) == list(found["host_seconds"]) == list(PARTS)
    on_device = {
        part: found["seconds"][part] for part in PARTS if part != "layout"
    }  # whose tables are made on the host
    assert min(on_device.values()) > 0 and found["share"] < 1
    assert made.count(True).steps[0].whole.peak > 0 and made.count(False).layer > 0


def test_live_bytes():
    region, later = Region(), Region()
    with torch.no_grad(), LiveBytes(CPU) as meter:
        before = torch.ones(1000)
        meter.open(region)
        assert region.peak == 0
        first = before + 1  # 4,000 bytes
        view = first.view(10, 100)[2:]
        before.add_(1)
        before.view(10, 100).t()
        assert (region.live, region.peak) == (4000, 4000)
        del first
        assert region.live == 4000  # the view holds it
        second = view.double()  # 6,400
        assert (region.live, region.peak) == (10400, 10400)
        del view
        meter.open(later)
        third = torch.ones(10, dtype=torch.bool)
        meter.close(region)
        assert (region.live, later.live) == (6410, 10)
        torch.ones(10**6)
        assert region.peak == 10400 and later.peak == 4 * 10**6 + 10
        del second, third, before
        assert region.live == 0 and later.live == 0
    outside = torch.ones(1000)
    with torch.no_grad(), meter:
        meter.open(region)
        outside.t().add_(1)
        assert (region.live, region.peak) == (0, 10400)


def test_ranges_open_regions():
    region = Region()
    with torch.no_grad(), LiveBytes(CPU) as meter:
        meter.on_range = lambda name: (region,) if name == "mine" else ()
        torch.ones(10)
        with record_function("mine"):
            with record_function("inner"):
                torch.ones(20)
            torch.ones(5)
        torch.ones(1000)
    assert (region.live, region.peak) == (0, 80)


def test_counts_are_the_same_twice():
    made = bench()
    assert made.count(True).operations == made.count(True).operations
    peaks = [[step.whole.peak for step in made.count(True).steps] for _ in range(2)]
    assert peaks[0] == peaks[1] and len(peaks[0]) == 2 and peaks[0][0] > peaks[0][1] > 0
    layers = [made.count(False).layer for _ in range(2)]
    length, rows = 74, 2
    assert (
        layers[0] == layers[1] > 3 * 4 * rows * length * SPEC.intermediate_size
    )  # gate, up and their product at once
    assert layers[0] < 4 * rows * length * (4 * SPEC.intermediate_size + 10 * SPEC.hidden_size)


@pytest.mark.parametrize("layers", [(1,), (3,)])
def test_what_compression_allocates_is_seen_and_what_the_layer_does_is_not(layers, monkeypatch):
    made, drop = bench("fastv", layers), merge.MERGERS["drop"]
    plain = made.count(True).steps[0].whole.peak
    assert plain >= 4 * 2 * 42 * SPEC.hidden_size  # the shorter hidden states at least
    size = 10**6

    def greedy(*arguments):
        torch.empty(size, dtype=torch.uint8)
        return drop.function(*arguments)

    block = made.model.get_decoder().layers[layers[0]].mlp
    hook = block.register_forward_hook(lambda *_: None if torch.empty(size).sum() else None)
    assert made.count(True).steps[0].whole.peak == plain
    assert made.count(False).layer > 4 * size
    hook.remove()
    monkeypatch.setitem(merge.MERGERS, "drop", dataclasses.replace(drop, function=greedy))
    (step,) = made.count(True).steps
    assert size <= step.whole.peak <= plain + size
    assert step.parts["score"].peak > 0
