"""What became of each sample of a training: counted in the log, in ``trainer_state.json``, and by name in
``samples.json``."""

import json
from collections import Counter
from collections.abc import Iterable
from enum import IntEnum
from pathlib import Path

import torch
import torch.distributed as dist

from libra.utils.files import write_text

from .samples import Data

REPORT = "samples.json"
STATE = "samples.pt"  # in a checkpoint


class Outcome(IntEnum):
    """Of two outcomes of one sample, in two epochs or on two processes, the higher one counts."""

    UNSEEN = 0
    UNREADABLE = 1  # an image or a video of it
    MISMATCHED = 2  # its rounds' tokens do not add up to the whole's
    BEHIND = 3  # its answers lie after the limit, where it is cut
    CUT = 4  # it was learned from, up to the limit
    USED = 5


REASONS = {
    Outcome.MISMATCHED: "its tokens do not add up to the template's: no answer could be told apart",
    Outcome.BEHIND: "its answers lie after the limit of tokens",
}


class Tally:
    """The outcomes of a data set's samples, first those that this process saw.

    Args:
        data: the samples, and those that were left out.
        device: of this process, for what processes tell each other.
    """

    def __init__(self, data: Data, device: torch.device):
        self.data, self.device = data, device
        self.outcomes = torch.zeros(len(data.samples), dtype=torch.uint8)
        self.reasons: dict[int, str] = {}  # of unreadable samples, by place in data.samples

    def add(self, seen: Iterable[tuple[int, int, str]]) -> None:
        """Note samples (place, outcome, reason), as a batch of the collator has them."""
        for place, outcome, reason in seen:
            self.outcomes[place] = max(int(self.outcomes[place]), outcome)
            if reason:
                self.reasons[place] = reason

    def gathered(self) -> torch.Tensor:
        """The outcomes over all processes; every process has to call this."""
        outcomes = self.outcomes.to(self.device, copy=True)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(outcomes, dist.ReduceOp.MAX)
        return outcomes.cpu()

    def share(self) -> None:
        """Take over what the other processes saw; every process has to call this."""
        self.outcomes = self.gathered()
        if dist.is_initialized() and dist.get_world_size() > 1:
            told: list = [None] * dist.get_world_size()
            dist.all_gather_object(told, self.reasons)
            self.reasons = {place: reason for reasons in told for place, reason in reasons.items()}

    def save(self, folder: Path) -> None:
        torch.save({"outcomes": self.outcomes, "reasons": self.reasons}, folder / STATE)

    def load(self, folder: Path) -> None:
        """Go on from what :meth:`save` wrote; nothing where a checkpoint has none."""
        if (folder / STATE).is_file():
            stored = torch.load(folder / STATE, weights_only=True)
            self.outcomes, self.reasons = stored["outcomes"], stored["reasons"]

    def counts(self) -> dict[str, int]:
        """For the log: samples used, cut, without labels and skipped, the last ones kind by kind too; what is
        0 is left out. Every process has to call this."""
        found = torch.bincount(self.gathered(), minlength=len(Outcome)).tolist()
        used, cut = found[Outcome.USED] + found[Outcome.CUT], found[Outcome.CUT]
        skipped = Counter(self.data.kinds())
        skipped["unreadable"] += found[Outcome.UNREADABLE]
        counts = {
            "samples_used": used,
            "samples_cut": cut,
            "samples_without_labels": found[Outcome.MISMATCHED] + found[Outcome.BEHIND],
            "samples_skipped": skipped.total(),
            **{f"samples_skipped/{kind}": n for kind, n in skipped.items()},
        }
        return {name: n for name, n in counts.items() if n or name == "samples_used"}

    def sentence(self, limit: int) -> str:
        """What was learned from, for the last line. Every process has to call this."""
        counts = self.counts()
        parts = [f"It learned from {counts['samples_used']} of {self.data.total} samples"]
        if cut := counts.get("samples_cut"):
            parts[0] += f", {cut} of them cut at {limit} tokens"
        if bare := counts.get("samples_without_labels"):
            parts.append(f"{bare} had no labels")
        if skipped := counts.get("samples_skipped"):
            kinds = [f"{n} {name.partition('/')[2]}" for name, n in counts.items() if "/" in name]
            parts.append(f"{skipped} were skipped ({', '.join(kinds)})")
        rest = self.data.total - sum(
            counts.get(f"samples_{name}", 0) for name in ("used", "without_labels", "skipped")
        )
        if rest:
            parts.append(f"{rest} were not reached")
        return "; ".join(parts)

    def write_report(self, folder: Path) -> None:
        """Name in ``samples.json`` every sample that was not simply used."""
        samples, found = self.data.samples, self.outcomes.tolist()

        def entry(place: int, why: str) -> dict:
            return {"sample": samples[place]["number"], "id": samples[place].get("id"), "why": why}

        skipped = [
            {"sample": n, "id": f.id, "why": str(f), "kind": f.kind}
            for n, f in sorted(self.data.faults.items())
        ]
        skipped += [
            {**entry(place, self.reasons.get(place, "it could not be read")), "kind": "unreadable"}
            for place, outcome in enumerate(found)
            if outcome == Outcome.UNREADABLE
        ]
        report = {
            "data": self.data.path,
            "samples": self.data.total,
            "used": sum(outcome >= Outcome.CUT for outcome in found),
            "images_put_in_front": self.data.placed,
            "rounds_without_an_answer": self.data.lost_rounds,
            "cut": [
                samples[place]["number"] for place, outcome in enumerate(found) if outcome == Outcome.CUT
            ],
            "without_labels": [
                entry(i, REASONS[outcome]) for i, outcome in enumerate(found) if outcome in REASONS
            ],
            "skipped": skipped,
        }
        write_text(folder / REPORT, json.dumps(report, indent=1) + "\n")


def announce(data: Data, most: int = 20) -> list[str]:
    """What is said of the data before a training begins, a line each."""
    lines = [f"{data.sentence(number)} (left out)" for number in sorted(data.faults)[:most]]
    if data.faults:
        kinds = ", ".join(f"{n} {kind}" for kind, n in data.kinds().items())
        lines.append(
            f"{len(data.faults)} of the {data.total} samples of {data.path} are left out ({kinds}); {REPORT} "
            "in the output folder names them all"
        )
    if data.placed:
        lines.append(
            f"{data.placed} samples have an image or video without a place for it in the text; it goes to "
            "the front of their first question"
        )
    if data.lost_rounds:
        lines.append(
            f"{data.lost_rounds} questions or answers are empty; those rounds are left out of their"
            " conversations"
        )
    return lines
