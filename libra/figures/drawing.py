"""The paper's Figures 1 and 2, drawn from a trace: which visual tokens became targets, and where the others
went."""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..config import Compression
from ..engine.places_on_pictures import Block, strip
from ..engine.trace import COMPENSATION, DROPPED, GONE, MERGED, TARGET, RowTrace, StageTrace, intervals
from ..media import open_image, png
from ..methods import SELECTORS
from ..places import INPUT, TOWER
from ..utils.files import write_text
from ..utils.plotting import HEAT, new_figure
from ..utils.sentences import show

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL = 3.5  # inches

# Okabe and Ito's colours, which the colour-blind can tell apart; vermilion, the compensation token's
# by themselves, would be taken for their orange, which is left out.
GROUP_COLORS = ("#0072B2", "#F0E442", "#009E73", "#CC79A7", "#56B4E9")
COMPENSATION_COLOR = "#D55E00"
VEIL_COLOR, VEIL = (
    "#d4d4d4",
    0.78,
)  # over tokens that are not kept; the kept ones stand out on white skies and at night
GONE_COLOR, GONE_VEIL = "#6e6e6e", 0.86
BORDER_COLOR = "#0072B2"
HEAT_VEIL = 0.75


@dataclass(frozen=True)
class Record:
    """All that a figure is drawn from.

    Attributes:
        trace: one row's, from ``libra.attach`` or a llava model's ``set_compression`` with ``trace=True``.
        compression: the one that was traced.
        blocks: where the visual tokens lie, in their order; a strip for each span where nothing is given.
    """

    trace: RowTrace
    compression: Compression
    blocks: tuple[Block, ...] = ()

    def __post_init__(self):
        if not self.trace.spans or not self.trace.stages:
            raise ValueError(
                "the trace has no visual tokens or no compression layer: there is nothing to draw"
            )
        blocks = tuple(self.blocks) or tuple(map(strip, self.trace.spans))
        object.__setattr__(self, "blocks", blocks)
        if len(self.parts) != len(self.trace.stages):
            raise ValueError(
                f"the trace has {len(self.trace.stages)} stages and its compression {len(self.parts)}; trace"
                " the image again"
            )
        drawn, traced = sum(block.tokens for block in blocks), sum(self.trace.spans)
        if drawn != traced:
            raise ValueError(
                f"the blocks hold {drawn} tokens and the trace {traced}; give one or more blocks for each"
                " span"
            )

    def save(self, path: str | Path) -> None:
        """Write it as JSON, with its pictures in it."""
        blocks = [
            {
                "tokens": b.tokens,
                "columns": b.columns,
                "newline": b.newline,
                "picture": b.picture and base64.b64encode(png(b.picture)).decode("ascii"),
            }
            for b in self.blocks
        ]
        data = {"compression": self.compression.to_dict(), "blocks": blocks, "trace": self.trace.to_json()}
        write_text(Path(path), json.dumps(data) + "\n")

    @property
    def parts(self) -> list[Compression]:
        """What was done at each stage."""
        if self.compression.steps is None:
            return [self.compression] * len(self.trace.stages)
        found = [
            (layer, part.at != TOWER, part) for part in self.compression.parts for layer in part.layers or ()
        ]
        return [part for *_, part in sorted(found, key=lambda one: one[:2])]

    @property
    def scored(self) -> bool:
        """Whether the first stage knows how important each token is, whatever it went by."""
        alive = [one[one == one] for one in self.trace.stages[0].importance.split(self.trace.spans)]
        return any(bool((one != one[:1]).any()) for one in alive)

    @classmethod
    def load(cls, path: str | Path) -> "Record":
        """Raises ValueError, naming the file, where it cannot be read or holds no record."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            blocks = tuple(map(_block, data["blocks"]))
            return cls(RowTrace.from_json(data["trace"]), Compression.from_dict(data["compression"]), blocks)
        except OSError as error:
            raise ValueError(
                f"{path} cannot be read ({error.strerror or error}); give a file of --save-trace"
            ) from None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(
                f"{path} is not a trace file of --save-trace ({reason}); trace the image again"
            ) from None


def _block(said: dict) -> Block:
    """A block of a trace file."""
    if not isinstance(said["newline"], bool):
        raise ValueError(f"newline: {show(said['newline'])} is neither true nor false")
    picture = said["picture"] and open_image(f"data:;base64,{said['picture']}", name="in it")
    return Block(said["tokens"], said["columns"], picture, said["newline"])


class Canvas:
    """Where everything lies, in units of a token's edge, from the top left: blocks in lines, one cell apart.

    Attributes:
        corners: (n, 2) long, x and y of each token's upper left corner.
        places: for each block (x, y).
        width, height: of everything.
    """

    def __init__(self, blocks: Sequence[Block]):
        self.blocks, self.places, corners = blocks, [], []
        in_line = ceil(sqrt(len(blocks)))
        self.width = top = 0
        for start in range(0, len(blocks), in_line):
            line, left = blocks[start : start + in_line], 0
            for block in line:
                index = torch.arange(block.tokens)
                corners.append(torch.stack([left + index % block.width, top + index // block.width], 1))
                self.places.append((left, top))
                left += block.width + 1
            self.width = max(self.width, left - 1)
            top += max(block.rows for block in line) + 1
        self.corners, self.height = torch.cat(corners), top - 1

    def borders(self, labels: torch.Tensor) -> torch.Tensor:
        """The edges between neighbouring cells of different ``labels`` (n,) and around blocks, (m, 2, 2): two
        points (x, y)."""
        raster = torch.full((self.height + 2, self.width + 2), -1)  # with an empty cell all around
        raster[self.corners[:, 1] + 1, self.corners[:, 0] + 1] = labels
        y, x = (raster[:, :-1] != raster[:, 1:]).nonzero().T
        upright = torch.stack([x, y - 1, x, y], 1)
        y, x = (raster[:-1] != raster[1:]).nonzero().T
        return torch.cat([upright, torch.stack([x - 1, y, x, y], 1)]).view(-1, 2, 2)


def fastv(trace: RowTrace, stage: int) -> torch.Tensor:
    """FastV's choice, (n,) bool: of each span as many tokens as the stage kept, the most important at the
    first compression layer, where the importance of all is known. Ties go to the first token."""
    chosen = []
    for importance, fate in zip(
        trace.stages[0].importance.split(trace.spans), trace.stages[stage].fate.split(trace.spans)
    ):
        order = importance.argsort(descending=True, stable=True)
        chosen.append(torch.zeros_like(fate, dtype=torch.bool))
        chosen[-1][order[: int((fate == TARGET).sum())]] = True
    return torch.cat(chosen)


def groups(stage: StageTrace) -> torch.Tensor:
    """The number of each token's merged group, in the order of their targets, (n,); -1 for a token in
    none."""
    merged = stage.slot[stage.fate == MERGED]
    number = torch.full_like(stage.slot, -1)
    targets = merged.unique()
    number[targets] = torch.arange(len(targets))
    number[stage.fate == MERGED] = number[merged]
    return number


def draw(record: Record) -> "Figure":
    """A row of panels for each compression: where importance is known, FastV's choice and the importance as a
    heat map; the targets (in their intervals, where it has some) and, where there is any, the merging.

    Raises:
        ValueError: if matplotlib is missing.
    """
    trace, canvas = record.trace, Canvas(record.blocks)
    merges = any(
        bool((stage.fate == fate).any()) for stage in trace.stages for fate in (MERGED, COMPENSATION)
    )
    columns = 1 + 2 * record.scored + merges
    height = PANEL * min(2.5, max(0.3, canvas.height / canvas.width)) + 0.4
    figure = new_figure(columns * PANEL + 0.2, len(trace.stages) * height + 0.8)
    figure.suptitle(_describe(record), fontsize=11)
    rows = figure.subplots(len(trace.stages), columns, squeeze=False)
    for number, (panels, stage) in enumerate(zip(rows, trace.stages)):
        by_score, heat, choice, merging = _titles(record, number)
        panels = iter(panels)
        if record.scored:
            panel = next(panels)
            _draw_kept(panel, canvas, fastv(trace, number))
            panel.set_title(by_score, fontsize=9)
            panel = next(panels)
            _draw_heat(panel, canvas, stage.importance)
            panel.set_title(heat, fontsize=9)
        panel = next(panels)
        of_interval = _has_intervals(record.parts[number])
        _draw_targets(panel, canvas, stage, intervals(trace, number) if of_interval else None)
        panel.set_title(choice, fontsize=9)
        if merges:
            panel = next(panels)
            _draw_merging(panel, canvas, stage)
            panel.set_title(merging, fontsize=9)
    _add_legend(figure, record)
    return figure


def _place(stage: StageTrace, part: Compression) -> str:
    """Where a step was."""
    return (part.at or INPUT) if stage.layer < 0 else f"layer {stage.layer}"


def _has_intervals(part: Compression) -> bool:
    return SELECTORS[part.select].per_interval


def _describe(record: Record) -> str:
    c, tokens = record.compression, sum(record.trace.spans)
    what = [
        f"{f'{part.method}: ' if part.method else ''}select {part.select}, merge {part.merge}, {part.amount}"
        f" {part.where}"
        for part in c.parts
    ]
    return f"{', then '.join(what)}; {tokens} visual tokens"


def _titles(record: Record, number: int) -> tuple[str, str, str, str]:
    """Of the four panels of a stage."""
    trace, stage = record.trace, record.trace.stages[number]
    before, after, tokens = int((stage.fate != GONE).sum()), len(trace.kept(number)), sum(trace.spans)
    merged, rest, dropped = (int((stage.fate == fate).sum()) for fate in (MERGED, COMPENSATION, DROPPED))
    kept = f"{after} of {tokens} tokens kept ({100 * after / tokens:.3g}%)"
    part, first = record.parts[number], record.parts[0]
    how = "the best of each interval" if _has_intervals(part) else f"select {part.select}"
    scores = "importance at" if first.importance != "tower" else "score of the tower,"
    gone = [
        f"{count} {what}"
        for count, what in (
            (merged, "merged"),
            (rest, "into the compensation token"),
            (dropped, "dropped"),
        )
        if count
    ]
    return (
        f"FastV: top-k by the {scores} {_place(trace.stages[0], first)}\n{kept}",
        f"{_place(stage, part)}: {scores.split()[0]}\nby rank, dark to bright",
        f"{_place(stage, part)}: {how}\n{kept}",
        f"{_place(stage, part)}: the other {before - after} of {before} tokens:\n{', '.join(gone) or 'none'}",
    )


def _backdrop(panel: "Axes", canvas: Canvas) -> None:
    """The pictures, and token numbers where there is none."""
    panel.set(xlim=(-0.3, canvas.width + 0.3), ylim=(canvas.height + 0.3, -0.3), aspect="equal")
    panel.axis("off")
    first = 0
    for block, (left, top) in zip(canvas.blocks, canvas.places):
        if block.picture is not None:
            extent = (left, left + block.columns, top + block.rows, top)
            panel.imshow(block.picture, extent=extent, aspect="equal", zorder=0)
        else:
            for row in range(0, block.rows, max(1, block.rows // 8)):
                number = str(first + row * block.width)
                panel.text(left - 0.4, top + row + 0.5, number, ha="right", va="center", fontsize=6)
        first += block.tokens
    panel.set(xlim=(-0.3, canvas.width + 0.3), ylim=(canvas.height + 0.3, -0.3))  # imshow has set its own


def _fill(panel: "Axes", canvas: Canvas, which: torch.Tensor, **style) -> None:
    """Paint the cells ``which`` (n,) bool."""
    from matplotlib.collections import PolyCollection

    corners = canvas.corners[which].float()
    square = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    cells = list((corners[:, None] + square).numpy())
    panel.add_collection(PolyCollection(cells, **{"linewidths": 0, **style}))


def _lines(panel: "Axes", edges: torch.Tensor, **style) -> None:
    from matplotlib.collections import LineCollection

    panel.add_collection(LineCollection(list(edges.numpy()), **style))


def _frame(panel: "Axes", canvas: Canvas, which: torch.Tensor) -> None:
    """Outline each of the cells ``which``."""
    edge = min(2.2, 30 / max(canvas.width, canvas.height))
    _fill(panel, canvas, which, facecolors="none", edgecolors="black", linewidths=edge, zorder=5)


def _draw_kept(panel: "Axes", canvas: Canvas, kept: torch.Tensor) -> None:
    _backdrop(panel, canvas)
    _fill(panel, canvas, ~kept, facecolors=VEIL_COLOR, alpha=VEIL)
    _frame(panel, canvas, kept)


def _draw_heat(panel: "Axes", canvas: Canvas, importance: torch.Tensor) -> None:
    """The ranks of ``importance`` (n,) among the tokens that have one, in the colours of :data:`HEAT`."""
    from matplotlib import colormaps

    _backdrop(panel, canvas)
    known = importance.isfinite()
    ranks = importance[known].argsort().argsort().double() / max(1, int(known.sum()) - 1)
    _fill(panel, canvas, ~known, facecolors=GONE_COLOR, alpha=GONE_VEIL)
    _fill(panel, canvas, known, facecolors=colormaps[HEAT](ranks.numpy()), alpha=HEAT_VEIL)


def _veiled(panel: "Axes", canvas: Canvas, stage: StageTrace) -> None:
    """The picture, dark where tokens are not targets."""
    _backdrop(panel, canvas)
    _fill(panel, canvas, stage.fate > TARGET, facecolors=VEIL_COLOR, alpha=VEIL)
    _fill(panel, canvas, stage.fate == GONE, facecolors=GONE_COLOR, alpha=GONE_VEIL)


def _draw_targets(panel: "Axes", canvas: Canvas, stage: StageTrace, runs: torch.Tensor | None) -> None:
    _veiled(panel, canvas, stage)
    if runs is not None:
        _lines(
            panel, canvas.borders(runs), colors=BORDER_COLOR, linewidths=min(1.2, 22 / canvas.width), zorder=4
        )
    _frame(panel, canvas, stage.fate == TARGET)


def _draw_merging(panel: "Axes", canvas: Canvas, stage: StageTrace) -> None:
    _veiled(panel, canvas, stage)
    _fill(panel, canvas, stage.fate == COMPENSATION, facecolors=COMPENSATION_COLOR, alpha=0.85)
    number = groups(stage)
    for k, color in enumerate(GROUP_COLORS):
        own = (number >= 0) & (number % len(GROUP_COLORS) == k)
        _fill(panel, canvas, own & (stage.fate == MERGED), facecolors=color, alpha=0.55)
        _fill(panel, canvas, own & (stage.fate == TARGET), facecolors=color)
    members = stage.fate == MERGED
    ways = torch.stack([canvas.corners[members], canvas.corners[stage.slot[members]]], 1) + 0.5
    _lines(panel, ways, colors="black", alpha=0.7, linewidths=0.6, zorder=6)
    _frame(panel, canvas, stage.fate == TARGET)


def _add_legend(figure: "Figure", record: Record) -> None:
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    fates = torch.cat([stage.fate for stage in record.trace.stages]).tolist()
    entries = [
        (True, "kept: a target", Patch(facecolor="none", edgecolor="black")),
        (any(map(_has_intervals, record.parts)), "border of an interval", Line2D([], [], color=BORDER_COLOR)),
        (
            MERGED in fates,
            "merged, with a line to its target",
            tuple(Patch(facecolor=color) for color in GROUP_COLORS[:3]),
        ),
        (COMPENSATION in fates, "in the compensation token", Patch(facecolor=COMPENSATION_COLOR)),
        (True, "not kept", Patch(facecolor=VEIL_COLOR)),
        (GONE in fates, "gone at an earlier layer", Patch(facecolor=GONE_COLOR)),
    ]
    _, labels, handles = zip(*(entry for entry in entries if entry[0]))
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=6,
        fontsize=8,
        frameon=False,
        handlelength=1.6,
        columnspacing=1.4,
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
    )
