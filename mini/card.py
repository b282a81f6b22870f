"""Put the training's curves and log next to the model card: ``python -m mini.card mini/run/work
--output mini``."""

import json
from pathlib import Path

from libra.utils.cli import Parser
from libra.utils.files import write_text
from libra.utils.plotting import new_figure, save

STAGES = {"stage1": "Stage 1: a small CLIP", "stage2": "Stage 2: questions"}


def read_log(work: Path) -> dict[str, dict[str, list[dict]]]:
    """Of each stage its losses and its scores, with step and seconds; ``work`` is the working folder."""
    log = {}
    for stage in STAGES:
        losses, scores = [], []
        for entry in json.loads((work / stage / "log.json").read_text()):
            if "loss" in entry:
                losses.append(
                    {"step": entry["step"], "loss": float(entry["loss"]), "seconds": entry["seconds"]}
                )
            elif "scores" in entry:
                scores.append({"step": entry["step"], "scores": entry["scores"]})
        log[stage] = {"losses": losses, "scores": scores}
    return log


def draw(log: dict[str, dict[str, list[dict]]], path: Path) -> None:
    """A row a stage: loss against steps, logarithmic, and what is right of the validation images in per
    cent."""
    figure = new_figure(11, 4 * len(log))
    rows = figure.subplots(len(log), 2)
    for (left, right), (stage, entries) in zip(rows, log.items()):
        left.plot(
            [e["step"] for e in entries["losses"]], [e["loss"] for e in entries["losses"]], linewidth=1.2
        )
        left.set(title=STAGES[stage], xlabel="steps", ylabel="training loss", yscale="log")
        steps = [e["step"] for e in entries["scores"]]
        for number, name in enumerate(sorted({name for e in entries["scores"] for name in e["scores"]})):
            values = [e["scores"].get(name) for e in entries["scores"]]
            right.plot(
                steps,
                values,
                linewidth=1.2,
                linestyle=("-", "--")[number >= 10],
                label=name.replace("_", " "),
            )
        right.set(title="Validation", xlabel="steps", ylabel="right, %", ylim=(0, 101))
        right.legend(fontsize=7, loc="lower right", ncols=2)
        for panel in (left, right):
            panel.grid(alpha=0.3, which="both")
    save(figure, path, dpi=110)


def main() -> None:
    parser = Parser(prog="python -m mini.card", description=__doc__)
    parser.add_argument("work", type=Path, help="working folder of mini.train")
    parser.add_argument(
        "--output", type=Path, default=Path("mini"), help="folder for curve.png and training_log.json"
    )
    options = parser.parse_args()
    log = read_log(options.work)
    draw(log, options.output / "curve.png")
    write_text(options.output / "training_log.json", json.dumps(log) + "\n")
    for stage, entries in log.items():
        last = entries["losses"][-1]
        print(
            f"{stage}: {last['step']} steps, {last['seconds'] / 60:.0f} minutes, last loss {last['loss']:.3f}"
        )


if __name__ == "__main__":
    main()
