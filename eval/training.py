"""The second part of Table E: how its checkpoints were fine-tuned and what a step costs, as
:mod:`mini.finetune` noted it next to the cells."""

from statistics import fmean

from .formats import Grid, markdown
from .suites import Table

NOTED = "training.json"  # in the results folder


def training_block(table: Table, noted: dict, grids: list[Grid]) -> list[str]:
    """Markdown of what :mod:`mini.finetune` noted; its grid is appended to ``grids``."""
    grids.append(_cost_grid(table, noted["cost"]))
    return [
        "## The fine-tuning",
        "",
        _setup(noted["setup"]),
        "",
        *(_run(heading, noted["training"][name]) for name, heading in _names(table).items()),
        "",
        "## What a step costs",
        "",
        "Forward and backward of the language model, without vision tower and optimizer, with "
        "Libra-Merging, 50% against all visual tokens: in turns in one process of one thread, CPU seconds, "
        "the median of the pairs' ratios and its interval. FLOPs: of all tokens in the layers, the text's "
        "too. Memory: the peak above the weights, gradients included, each in a process of its own.",
        "",
        *markdown(grids[-1]),
        "",
    ]


def _names(table: Table) -> dict[str, str]:
    """Of each fine-tuned checkpoint the heading that its rows stand under."""
    headings = {table.trained_for(row): heading for heading, rows in table.sections.items() for row in rows}
    return {name: headings[name] for name in table.trained}


def _setup(setup: dict) -> str:
    return (
        f"From mini/checkpoint on {setup['samples']:,} fresh images with {setup['turns']} questions each "
        f"(scenes and easy-VQA, in the shares of its own training): {setup['steps']} steps of "
        f"{setup['rows']} images, learning rate {setup['learning_rate']:g} with a cosine, vision tower "
        f"frozen, bfloat16, seed {setup['seed']}. All runs see the same samples in the same order; "
        f"{setup['processes']} processes each, one run after the other."
    )


def _run(heading: str, log: dict) -> str:
    losses = [loss for _, loss in log["losses"]]
    last = fmean(losses[-max(1, len(losses) // 10) :])
    return f"- {heading}: last training loss {last:.3f}, {log['train_runtime'] / 60:.1f} minutes"


def _cost_grid(table: Table, entries: list[dict]) -> Grid:
    header = ["decoder", "tokens", "seconds, all tokens", "seconds, compressed", "ratio", "FLOPs ratio"]
    lines: list = []
    for entry in entries:
        sizes, ratio = entry["sizes"], entry["ratio"]
        lines.append(
            [
                sizes["name"],
                f"{sizes['rows']} × ({sizes['visual']} + {sizes['text']})",
                *(f"{seconds:.3f}" for seconds in entry["cpu_seconds"]),
                f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f}, {entry['pairs']} pairs)",
                f"{entry['flops_ratio']:.3f}",
                f"{ratio['median'] / entry['flops_ratio']:.2f}",
                " → ".join(f"{size / 2**20:.0f}" for size in entry["peak_bytes"]),
            ]
        )
    return Grid([*header, "ratio ÷ FLOPs ratio", "memory, MiB"], lines, f"{table.title}: what a step costs")
