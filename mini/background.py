"""What the model needs the background for: ``python -m mini.background [--scenes 100]``.

It reads digits in order while a rule that knows the scene says which visual tokens stay, as many for each
rule. A table of exact match is printed: rule × layer after which the others go × share that goes.
"""

from collections.abc import Callable

from libra.utils.cli import Parser, whole_from

LAYERS, RATIOS = (0, 2, 5), (0.5, 0.75)
EACH = 7  # tokens of each of the nine cells that "each cell" rules keep first: 63 of 256


def scores(owners, cells, occupied, draw) -> dict[str, Callable]:
    """Rule → scores (B, N) of the visual tokens, the highest of which stay.

    Args:
        owners: (B, N) bool, tokens with a digit on them; the other three likewise:
        cells: (N,), each token's cell of the board; occupied: (B, N) bool, tokens of cells that hold a digit;
        draw: (B, N), random numbers in [0, 1).
    """

    def first_of_cells(wish):
        ranks = wish.new_zeros(wish.shape)
        for cell in range(9):
            inside = (cells == cell).nonzero().flatten()
            ranks[:, inside] = wish[:, inside].argsort(1, descending=True).argsort(1).float()
        return (ranks < EACH) * 2.0 + wish * 1e-3

    digits = owners.float()
    return {
        "at random": draw,
        "digits, then at random": 2 * digits + draw,
        "digits, then cells with a digit": 4 * digits + 2 * occupied + draw,
        "digits, then empty cells": 4 * digits + 2 * ~occupied + draw,
        f"{EACH} of each cell, at random": first_of_cells(draw),
        f"{EACH} of each cell, digits first": first_of_cells(digits + draw / 2),
        "no digit": draw - 2 * digits,
    }


def measure(folder: str, count: int) -> list[tuple[str, int, float, float]]:
    """(rule, layer, ratio, right answers in per cent) of the checkpoint in ``folder`` on ``count`` scenes."""
    import numpy as np
    import torch

    from libra import Compression, register_select
    from libra.lmms.models_base import Sample
    from libra.lmms.models_llava import Llava
    from libra.mini.benchmark import scene_sample
    from libra.mini.scenes import BOARD
    from libra.rows import Row

    from .build import GRID

    engine = Llava(folder, None, "cpu", torch.float32)
    samples = [scene_sample("reading", index) for index in range(count)]
    owners = torch.from_numpy(np.stack([sample.scene.owners for sample in samples])) >= 0
    places = torch.arange(GRID) * BOARD // GRID
    cells = (places[:, None] * BOARD + places).flatten()
    filled = torch.zeros(count, BOARD * BOARD, dtype=torch.bool)
    for row, sample in zip(filled, samples):
        row[[digit.row * BOARD + digit.column for digit in sample.scene.digits]] = True
    draw = torch.rand(owners.shape, generator=torch.Generator().manual_seed(0))
    asked = [Sample("a scene", sample.question, [sample.image]) for sample in samples]
    current = {}
    register_select("scene")(lambda candidates, c: candidates.top(current["scores"]))

    def right(compression) -> float:
        engine.set_row(Row("mini", compression), trace=False)
        said, _ = engine.generate(asked, {"max_new_tokens": 8})
        return 100 * float(np.mean([text == sample.answer for text, sample in zip(said, samples)]))

    found = [("the plain model", -1, 0.0, right(Compression(method="vanilla")))]
    for rule, current["scores"] in scores(owners, cells, filled[:, cells], draw).items():
        for layer in LAYERS:
            for ratio in RATIOS:
                compression = Compression(select="scene", merge="drop", layers=[layer], ratio=ratio)
                found.append((rule, layer, ratio, right(compression)))
    return found


def main() -> None:
    parser = Parser(prog="python -m mini.background", description=__doc__)
    parser.add_argument("--model", default="mini/checkpoint", help="folder (default %(default)s)")
    parser.add_argument("--scenes", type=whole_from(1), default=100, help="default %(default)s")
    options = parser.parse_args()
    found = {tuple(key): value for *key, value in measure(options.model, options.scenes)}
    columns = [(layer, ratio) for layer in LAYERS for ratio in RATIOS]
    print(f"plain model: {found.pop(('the plain model', -1, 0.0)):.0f}")
    print("| what stays | " + " | ".join(f"layer {layer}, {ratio:.0%} go" for layer, ratio in columns) + " |")
    print("|---|" + "--:|" * len(columns))
    for rule in dict.fromkeys(rule for rule, _, _ in found):
        print(f"| {rule} | " + " | ".join(f"{found[rule, *column]:.0f}" for column in columns) + " |")


if __name__ == "__main__":
    main()
