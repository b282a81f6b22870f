"""The measurement of :mod:`libra.latency.methods`: rounds of all methods in turns, kept as they come."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

from ..config import Compression
from ..rows import ModelSpec
from ..utils.devices import device_name, find_device
from ..utils.files import write_json
from ..utils.provenance import commit, machine, versions
from ..utils.timing import in_order
from .bench import Bench, Prompt
from .methods import VANILLA
from .parts import profile_parts
from .random_weights import random_model
from .vision import tower_of

SETTINGS = ("model", "layers", "keep", "ratio", "text_tokens", "dtype")


def run(args, spec: ModelSpec, ways: dict[str, Compression]) -> dict[str, dict]:
    """Measure what is missing; :func:`summary` of all.

    Raises:
        ValueError: for a model that cannot be measured, and for a file of another measurement.
    """
    device = find_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    tower = tower_of(spec)
    visual = (tower["image_size"] // tower["patch_size"]) ** 2
    about = {name: getattr(args, name) for name in SETTINGS} | {"methods": list(ways)}
    about |= {"device": device_name(device), "threads": torch.get_num_threads(), "commit": commit()}
    kept = stored(args.json, about)
    benches = {}
    if len(kept["rounds"]) < args.pairs:
        model = random_model(spec, args.layers, getattr(torch, args.dtype), device, tower=tower)
        prompt = Prompt(visual, args.text_tokens)
        benches = {name: Bench(model, c, prompt, pictures=True) for name, c in ways.items()}
    measured = Rounds(kept, benches, lambda: _write(args.json, kept))
    measured.fill(args.pairs)
    return summary(kept, ways)


class Rounds:
    """Rounds of a measurement; ``kept`` has what was measured, and ``write`` is called after every round."""

    def __init__(self, kept: dict, benches: dict[str, Bench], write: Callable[[], None]):
        self.kept, self.benches, self.write = kept, benches, write

    def fill(self, rounds: int) -> None:
        todo = range(len(self.kept["rounds"]), rounds)
        if not todo:
            return
        with tqdm(total=(1 + len(todo)) * (1 + len(self.benches)), unit=" prefills") as bar:
            self._warm_up(bar)
            ways = {VANILLA: partial(self._timed, next(iter(self.benches.values())), False)}
            ways |= {
                name: partial(self._timed, bench, True)
                for name, bench in self.benches.items()
                if name not in self.kept["failed"]
            }
            for number in todo:
                found = {}
                for name in in_order(number, list(ways)):
                    found[name] = ways[name]()
                    bar.update()
                self.kept["rounds"].append(found)
                self.write()

    def _warm_up(self, bar: tqdm) -> None:
        """Every way once; of a method also what its step takes, under the profiler."""
        self._timed(next(iter(self.benches.values())), False)
        bar.update()
        for name, bench in self.benches.items():
            if name not in self.kept["selection"]:
                try:
                    bench.run(True)
                    self.kept["selection"][name] = profile_parts(bench, 1)["sum"]
                except ValueError as error:  # such as a method for videos
                    self.kept["failed"][name] = str(error)
            else:
                bench.run(True)
            bar.update()

    @staticmethod
    def _timed(bench: Bench, compressed: bool) -> dict[str, float]:
        found = bench.run(compressed)
        return {"tower": found.vision.wall, "prefill": found.prefill.wall}


def stored(path: Path | None, about: dict) -> dict:
    """What a file of an earlier run holds, or an empty measurement.

    Raises:
        ValueError: where it is not of the same measurement.
    """
    if path is None or not path.exists():
        provenance = {"machine": machine(), "versions": versions(("torch", "transformers"))}
        return {"about": about, **provenance, "selection": {}, "failed": {}, "rounds": []}
    kept = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(kept, dict) or kept.get("about") != about:
        raise ValueError(
            f"--json: {path} holds another measurement (settings, device or commit differ); name a new file"
        )
    return kept


def _write(path: Path | None, kept: dict) -> None:
    if path is not None:
        write_json(path, kept)


def summary(kept: dict, ways: dict[str, Compression]) -> dict[str, dict]:
    """Of vanilla and each method the medians in seconds: ``tower``, ``selection``, ``prefill`` without it,
    ``together``; ``ratio``: the median over the rounds of tower and prefill over vanilla's; ``failed``: why
    it does not run here."""
    rounds = kept["rounds"]

    def whole(one: dict) -> float:
        return one["tower"] + one["prefill"]

    found: dict[str, dict] = {}
    for name in (VANILLA, *ways):
        if name in kept["failed"]:
            found[name] = {"failed": kept["failed"][name]}
            continue
        selection = kept["selection"].get(name, 0.0)
        c = ways.get(name)
        found[name] = {
            "amount": "all" if c is None else c.amount,
            "where": "" if c is None else _short(c),
            "tower": median(one[name]["tower"] for one in rounds),
            "selection": selection,
            "prefill": median(one[name]["prefill"] for one in rounds) - selection,
            "together": median(whole(one[name]) for one in rounds),
            "ratio": median(whole(one[name]) / whole(one[VANILLA]) for one in rounds),
        }
    return found


def _short(c: Compression) -> str:
    return c.at or c.where
