"""Draw the training curve of the embedded model from its log: ``python -m mini.card mini/run/work/log.json
--output mini``."""

import json
from pathlib import Path

from libra.utils.cli import Parser
from libra.utils.files import replacing, write_text


def draw(log: dict[str, list[dict]], path: Path) -> None:
    """One panel a stage: loss against minutes, logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(log), figsize=(9, 3), constrained_layout=True)
    titles = {"stage1": "Stage 1: patch labels", "stage2": "Stage 2: questions (and fading patch labels)"}
    for panel, (stage, entries) in zip(panels, log.items()):
        points = [(entry["seconds"] / 60, entry["loss"]) for entry in entries]
        panel.plot(*zip(*points), linewidth=1.2)
        panel.set(title=titles[stage], xlabel="minutes", ylabel="training loss", yscale="log")
        panel.grid(alpha=0.3, which="both")
    with replacing(path) as work:
        figure.savefig(work, dpi=110, format="png")


def one_clock(entries: list[dict]) -> list[dict]:
    """The entries that have a loss, with seconds that go on where a resumed run began to count from 0
    again."""
    points, before, last = [], 0.0, 0.0
    for entry in entries:
        if "loss" in entry:
            if entry["seconds"] < last:
                before += last
            last = entry["seconds"]
            points.append({"step": entry["step"], "loss": entry["loss"], "seconds": round(before + last, 1)})
    return points


def main() -> None:
    parser = Parser(prog="python -m mini.card", description=__doc__)
    parser.add_argument("log", type=Path, help="log.json of mini.train")
    parser.add_argument(
        "--output", type=Path, default=Path("mini"), help="folder for curve.png and training_log.json"
    )
    options = parser.parse_args()
    log = json.loads(options.log.read_text())
    kept = {stage: one_clock(entries) for stage, entries in log.items()}
    draw(kept, options.output / "curve.png")
    write_text(options.output / "training_log.json", json.dumps(kept) + "\n")
    for stage, entries in kept.items():
        last = entries[-1]
        print(
            f"{stage}: {last['step']} steps, {last['seconds'] / 60:.0f} minutes, last loss {last['loss']:.3f}"
        )


if __name__ == "__main__":
    main()
