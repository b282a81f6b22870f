"""From the answers of many loads to figures, a table and a picture."""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from ..utils.plotting import new_figure, save
from .load import Run

SERVERS = ("vanilla", "compressed")
Measured = Sequence[tuple[str, float, str, Run]]


def rates_from(text: str) -> tuple[float, ...]:
    """An argparse type: requests a second, with commas between them."""
    try:
        rates = tuple(float(part) for part in text.split(","))
    except ValueError:
        rates = ()
    if not rates or not all(0.001 <= rate <= 10_000 for rate in rates):
        raise argparse.ArgumentTypeError(
            f"{text} is not a list of numbers from 0.001 to 10000, such as 0.5,1,2"
        )
    return rates


def summary(measured: Measured) -> dict:
    """JSON values of all loads.

    Returns:
        ``loads``: for each loop and level and each server the medians over turns of requests a second, and
        of the seconds to the first token and to the end (median and 90th percentile of a turn's requests),
        with ``ratio``, the median over turns of compressed over vanilla requests a second; ``answers``: of
        how many questions the two servers' answers are equal, how many changed from one load to another
        (none should) and how many requests failed, with the first error; ``flops_saved``: the mean that the
        compressed server says.
    """
    groups: dict[tuple[str, float], dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for loop, level, server, run in measured:
        groups[loop, level][server].append(run)
    loads = []
    for (loop, level), runs in groups.items():
        entry = {"loop": loop, "clients" if loop == "closed" else "rate": level}
        entry |= {server: _figures(its) for server, its in runs.items()}
        pairs = zip(runs["vanilla"], runs["compressed"])
        entry["ratio"] = round(median(_rate(own) / _rate(plain) for plain, own in pairs), 3)
        loads.append(entry)
    return {"loads": loads, **_answers(measured)}


def _rate(run: Run) -> float:
    """Answered requests a second; failed ones do not count, and no division fails for want of one."""
    return max(sum(answer.text is not None for answer in run.answers), 1e-9) / run.seconds


def _figures(runs: list[Run]) -> dict:
    def over_turns(name: str, share: float) -> float:
        return round(median(_quantile([getattr(a, name) for a in run.answers], share) for run in runs), 4)

    return {
        "requests_per_second": round(median(map(_rate, runs)), 4),
        "first_token": {"median": over_turns("first", 0.5), "p90": over_turns("first", 0.9)},
        "seconds": {"median": over_turns("seconds", 0.5), "p90": over_turns("seconds", 0.9)},
    }


def _quantile(values: list[float], share: float) -> float:
    """The smallest value that at least this share of them does not pass."""
    return sorted(values)[max(0, -int(-share * len(values) // 1) - 1)]


def _answers(measured: Measured) -> dict:
    said: dict[tuple[str, int], set[str]] = defaultdict(set)
    failed, saved = [], []
    for _, _, server, run in measured:
        for answer in run.answers:
            if answer.text is None:
                failed.append(answer.error)
            else:
                said[server, answer.question].add(answer.text)
                known = server == "compressed" and answer.flops_saved is not None
                saved += [answer.flops_saved] if known else []
    both = [number for server, number in said if server == "vanilla" and ("compressed", number) in said]
    return {
        "answers": {
            "questions": len(both),
            "equal": sum(said["vanilla", number] == said["compressed", number] for number in both),
            "changing": sum(len(texts) > 1 for texts in said.values()),
            "failed": len(failed),
            "first_error": failed[0] if failed else None,
        },
        "flops_saved": round(sum(saved) / len(saved), 4) if saved else None,
    }


def table(data: dict) -> str:
    """The figures in Markdown, a line a load."""
    lines = [
        "| load | requests/s: vanilla | compressed | ratio | first token, s: vanilla | compressed |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for load in data["loads"]:
        closed = load["loop"] == "closed"
        name = f"{load['clients']} clients" if closed else f"{load['rate']:g} requests/s"
        plain, own = ((load[s]["requests_per_second"], load[s]["first_token"]["median"]) for s in SERVERS)
        cells = (
            f"{plain[0]:.2f}",
            f"{own[0]:.2f}",
            f"{load['ratio']:.2f}",
            f"{plain[1]:.3f}",
            f"{own[1]:.3f}",
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    answers = data["answers"]
    lines += ["", f"{answers['equal']} of {answers['questions']} answers are those of the vanilla server."]
    if answers["failed"]:
        lines.append(f"{answers['failed']} requests failed, the first one so: {answers['first_error']}")
    return "\n".join(lines)


def picture(data: dict, path: Path) -> None:
    """Requests a second and the time to the first token, with closed and open loops. Raises ValueError if
    matplotlib is missing."""
    figure = new_figure(12, 3.8)
    axes = figure.subplots(1, 3)
    closed = [load for load in data["loads"] if load["loop"] == "closed"]
    opened = [load for load in data["loads"] if load["loop"] == "open"]
    plots = (
        (axes[0], closed, "clients", "requests a second", lambda part: part["requests_per_second"]),
        (
            axes[1],
            closed,
            "clients",
            "seconds to the first token",
            lambda part: part["first_token"]["median"],
        ),
        (axes[2], opened, "rate", "seconds to the first token", lambda part: part["first_token"]["median"]),
    )
    for axis, loads, key, name, value in plots:
        for server, colour in (("vanilla", "0.5"), ("compressed", "C0")):
            points = [(load[key], value(load[server])) for load in loads]
            axis.plot(*zip(*points) if points else ((), ()), "o-", color=colour, label=server)
        axis.set_xlabel(
            "clients, each after its last answer"
            if key == "clients"
            else "requests a second, at random times"
        )
        axis.set_ylabel(name)
        axis.set_ylim(bottom=0)
    if closed:
        for axis in axes[:2]:
            axis.set_xscale("log", base=2)
            axis.set_xticks([load["clients"] for load in closed], [str(load["clients"]) for load in closed])
    axes[0].legend()
    save(figure, path)
