"""How cost grows with visual tokens and rows: a file for each cell, so that a stopped run goes on; a table
and a picture."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from ..utils import numbers as units
from ..utils.files import write_json, write_text
from .bench import Bench, Prompt
from .paired import measure, prefills
from .plots import growth_picture
from .text import bounds, heading

EASY = 4096  # visual tokens of a batch up to which a cell gets all its pairs
FEWEST = 3  # pairs of the largest cells
SETTINGS = ("model", "layers", "weights", "compression", "dtype", "attention", "machine", "prompt")


def pairs_for(prompt: Prompt, pairs: int) -> int:
    """Fewer pairs for a larger cell, in proportion, but not under :data:`FEWEST` unless fewer are asked
    for."""
    return min(pairs, max(FEWEST, pairs * EASY // (prompt.batch * prompt.visual)))


@dataclass(frozen=True)
class Grid:
    """Which prompts are measured: every number of visual tokens × every number of rows.

    max_tokens: cells with more visual tokens in all their rows are left empty; text: text tokens of a row.
    """

    visual: Sequence[int]
    batches: Sequence[int]
    max_tokens: int
    text: int

    def prompts(self) -> list[Prompt]:
        """Of all cells, in the table's order."""
        visual, batches = sorted(set(self.visual)), sorted(set(self.batches))
        return [Prompt(n, self.text, batch) for n in visual for batch in batches]


class Growth:
    """The cells of one model and compression.

    Args:
        folder: where the cells, ``growth.md`` and ``growth.png`` are written.
        grid: of the cells; pairs: of a cell, fewer for the large ones.
        described: what every cell is, as :func:`libra.latency.command.describe` gives it.
    """

    def __init__(self, folder: Path, grid: Grid, pairs: int, described: dict):
        self.folder, self.pairs, self.described = folder, pairs, described
        self.grid = grid.prompts()
        small = [prompt for prompt in self.grid if prompt.batch * prompt.visual <= grid.max_tokens]
        self.prompts = sorted(small, key=lambda prompt: prompt.batch * prompt.visual)  # the quick ones first
        if not small:
            raise ValueError(
                f"--max-tokens: no cell has as few as {grid.max_tokens} visual tokens; give more"
            )

    def path(self, prompt: Prompt) -> Path:
        return self.folder / f"{prompt.visual}x{prompt.batch}.json"

    def stored(self, prompt: Prompt) -> dict | None:
        """A cell that was measured before; None where there is none, or one that cannot be read. ValueError
        for one of other settings."""
        path = self.path(prompt)
        try:
            cell = json.loads(path.read_text(encoding="utf-8"))
            settings = {key: cell[key] for key in SETTINGS}
            self._values(cell)  # it has all that the table shows
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None
        for key, value in self._settings(prompt).items():
            if settings[key] != value:
                raise ValueError(
                    f"{path} was measured with another {key}; give another --output, or delete it"
                )
        return None if "failed" in cell else cell

    def _settings(self, prompt: Prompt) -> dict:
        own = {**self.described, "prompt": asdict(prompt)}
        return json.loads(json.dumps({key: own[key] for key in SETTINGS}))

    def run(
        self, bench: Callable[[Prompt], Bench], spec, finish: Callable[[], dict], progress: bool = True
    ) -> None:
        """Measure what is missing, cell by cell, and write the table after each.

        ``finish`` gives what is written into a cell next to its figures: versions, commit, date. A cell that
        the device has no memory for is a failed cell, tried again the next time.
        """
        cells = {prompt: self.stored(prompt) for prompt in self.grid}  # earlier limits may have been higher
        missing = [prompt for prompt in self.prompts if cells[prompt] is None]
        total = sum(prefills(pairs_for(prompt, self.pairs)) for prompt in missing)
        with tqdm(total=total, unit=" prefills", disable=not progress) as bar:
            for prompt in missing:
                bar.set_description(
                    f"{prompt.visual} tokens × {prompt.batch}, {prompt.batch * prompt.visual} in all"
                )
                pairs = pairs_for(prompt, self.pairs)
                try:
                    found = measure(bench(prompt), spec, pairs, bar=bar)
                except torch.OutOfMemoryError:
                    found = {"failed": "out of memory"}
                cells[prompt] = {**self.described, "prompt": asdict(prompt), **found, **finish()}
                write_json(self.path(prompt), cells[prompt])
                self.write_table(cells)
        self.write_table(cells)
        measured = {(p.visual, p.batch): cell for p, cell in cells.items() if cell and "failed" not in cell}
        if measured:
            growth_picture(measured, self.folder / "growth.png")

    def write_table(self, cells: dict[Prompt, dict | None]) -> None:
        write_text(self.folder / "growth.md", "\n".join(self._lines(cells)) + "\n")

    def _lines(self, cells: dict[Prompt, dict | None]) -> Iterator[str]:
        yield "# How the prefill grows\n"
        yield from (f"    {line}" for line in heading(self.described))
        yield (
            f"    prompt         {self.prompts[0].text} text tokens next to the visual ones\n\nMeasured over "
            "promised: the median of the paired ratios of compressed and plain prefill, over the ratio of "
            "the FLOPs of all tokens. Shares are of the compressed prefill. Extra memory: compression's "
            "peak over one plain layer's. Empty: not measured, or larger than the run's limit.\n"
        )
        commits = sorted({cell["commit"] for cell in cells.values() if cell})
        yield f"Measured at commit {', '.join(commits) or '–'}.\n"
        columns = (
            "visual tokens",
            "batch",
            "pairs",
            "vanilla",
            "compressed",
            "measured ratio",
            "FLOPs ratio",
            "measured over promised",
            "compression's share",
            "similarity's share",
            "extra memory",
        )
        yield f"| {' | '.join(columns)} |"
        yield f"|{'--:|' * len(columns)}"
        for prompt in self.grid:
            values = [f"{prompt.visual:,}", str(prompt.batch), *self._values(cells[prompt])]
            yield f"| {' | '.join([*values, *[''] * (len(columns) - len(values))])} |"

    @staticmethod
    def _values(cell: dict | None) -> list[str]:
        if cell is None:
            return []
        if "failed" in cell:
            return ["", cell["failed"]]
        prefill, parts = cell["prefill"], cell["parts"]
        return [
            str(len(prefill["pairs"])),
            units.seconds(prefill["vanilla_seconds"]),
            units.seconds(prefill["compressed_seconds"]),
            f"{prefill['ratio']['median']:.3f} {bounds(prefill['ratio'])},"
            f" {prefill['ratio']['coverage']:.0%}",
            f"{cell['flops']['formula']['ratio']:.3f}",
            f"{prefill['ratio_over_flops_ratio']:.3f}",
            f"{parts['share']:.2%}",
            f"{parts['shares']['similarity']:.2%}" if "similarity" in parts["shares"] else "–",
            f"{cell['extra_memory']['ratio']:.2f}",
        ]
