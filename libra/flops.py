"""FLOPs of the visual tokens, as the paper counts them (§4.1): python -m libra.flops --config
configs/llava7b_r50.yaml"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from . import budget
from .budget import layer_flops, model_flops
from .config import NOTHING, Compression, ConfigError
from .methods import METHODS
from .places import IN_WORDS
from .rows import ModelSpec, Row, get_model
from .utils.cli import Parser, whole_from
from .utils.plotting import new_figure, save

__all__ = ["Cost", "cost", "layer_flops", "main", "model_flops", "plot", "report", "table"]
EXAMPLES = """examples:
  python -m libra.flops --config configs/llava7b_r50.yaml
  python -m libra.flops --config configs/next8b_r67.yaml --visual-tokens 2880 --json
  python -m libra.flops --config configs/llava7b_r50.yaml --plot layers.png"""


@dataclass(frozen=True)
class Cost:
    """tokens: visual tokens of each layer, with the reserved compensation tokens; layers: its
    multiply-accumulates; both over all sequences of a sample."""

    tokens: list[float]
    layers: list[float]

    @property
    def total(self) -> float:
        return sum(self.layers)

    @property
    def average_tokens(self) -> float:
        return budget.average(self.tokens)


def cost(
    spec: ModelSpec, c: Compression, visual_tokens: Sequence[int] | None = None, whole: bool = False
) -> Cost:
    """What the visual tokens of one sample cost under a compression.

    visual_tokens: the length of each sequence, the model's own by default; attention stays within a sequence.
    whole: count whole tokens, as a run does, not the real-valued N·(1-R)^k of the paper's tables.
    Raises ConfigError where a layer does not exist, or the number of tokens is not known.
    """
    sequences = spec.visual_tokens if visual_tokens is None else visual_tokens
    if not sequences:
        raise ConfigError(
            f"{spec.name} has as many visual tokens as its image asks for; give a number with --visual-tokens"
        )
    counts = [budget.counted(c, spec.layers, n, whole) for n in sequences]
    layers = list(zip(*counts, strict=True))
    return Cost([sum(layer) for layer in layers], [model_flops(spec, layer) for layer in layers])


def report(row: Row, visual_tokens: int | None = None) -> dict:
    """Everything the command prints, unrounded: sizes, both views (nominal, actual), vanilla, the paper's
    figures, notes.

    visual_tokens: one sequence of that length instead of the model's own. Raises ConfigError, naming the
        row's file.
    """
    spec, c = get_model(row.model, row.path), row.compression
    sequences = spec.visual_tokens if visual_tokens is None else (visual_tokens,)
    c.check_layers(spec.layers, row.path)
    vanilla = cost(spec, NOTHING, sequences)
    views: dict[str, dict] = {}
    for view, whole in (("nominal", False), ("actual", True)):
        counted = cost(spec, c, sequences, whole)
        views[view] = {
            "tokens_per_layer": counted.tokens,
            "flops_per_layer": counted.layers,
            "flops": counted.total,
            "ratio": counted.total / vanilla.total,
            "average_tokens": counted.average_tokens,
        }
    # The paper's figures are for the model's own number of visual tokens.
    paper = {
        key: row.paper[key]
        for key in ("table", "flops", "percent")
        if key in row.paper and visual_tokens is None
    }
    return {
        "row": row.name,
        "config": row.path,
        "model": spec.name,
        "sizes": {
            "layers": spec.layers,
            "d": spec.hidden_size,
            "m": spec.intermediate_size,
            "d_kv": spec.kv_size,
        },
        "visual_tokens": list(sequences),
        "compression": c.to_dict(),
        "vanilla_flops": vanilla.total,
        **views,
        "paper": paper,
        "notes": _notes(spec, c, sequences, views["nominal"]["ratio"], paper, visual_tokens is None),
    }


def _notes(
    spec: ModelSpec, c: Compression, sequences: Sequence[int], ratio: float, paper: dict, own_tokens: bool
) -> list[str]:
    left_out = "vision tower and compensation tokens"
    if any(part.reserves for part in c.parts):
        left_out = "vision tower and compensation tokens, but for the reserved ones"
    notes = [
        f"multiply-accumulates of the visual tokens in the decoder (§4.1), without text, {left_out}.",
        "nominal is N·(1-R)^k as a real number, which gives the paper's figures; actual is whole tokens,"
        " what a run computes.",
    ]
    if any(layer >= 0 for layer in c.layers):
        notes.append(
            "compression after layer L: layers 0 to L run on the longer sequence, the next ones on the"
            " shorter."
        )
    if spec.note and own_tokens:
        notes.append(spec.note)
    own_count = METHODS[c.method].own_count if c.method else ""
    if own_count and c.layers and len(c.layers) == 1 and c.layers[0] > 0:
        k = c.layers[0]
        earlier = cost(spec, replace(c, layers=(k - 1,)), sequences).total
        notes.append(f"{own_count.format(K=k, before=k - 1)}: layers [{k - 1}] here, {_total(earlier)}.")
    if "percent" in paper and paper["percent"] != round(100 * ratio):
        notes.append(f"the paper prints {paper['percent']}%; its formula gives {100 * ratio:.1f}%.")
    return notes


def table(data: dict) -> str:
    """The readable form of `report`'s dictionary."""
    nominal, actual, sizes, c = data["nominal"], data["actual"], data["sizes"], data["compression"]
    lines = [
        f"row            {data['row']}  ({data['config']})",
        f"model          {data['model']}: {sizes['layers']} layers, d {sizes['d']}, m {sizes['m']}, d_kv"
        f" {sizes['d_kv']}",
        f"compression    {_describe(c)}",
        f"visual tokens  {_sequences(data['visual_tokens'])}",
        "",
        f"{'':22}{'nominal':>18}{'':8}{'actual':>18}",
        f"{'layers':<22}{'tokens':>9}{'GFLOPs':>9}{'':8}{'tokens':>9}{'GFLOPs':>9}   (of one layer)",
    ]
    columns = zip(
        *(view[key] for view in (nominal, actual) for key in ("tokens_per_layer", "flops_per_layer")),
        strict=True,
    )
    for values, run in groupby(enumerate(columns), key=lambda item: item[1]):
        numbers = [layer for layer, _ in run]
        tokens, flops, whole, whole_flops = values
        name = f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
        lines.append(
            f"{name:<22}{_number(tokens):>9}{_giga(flops):>9}{'':8}{whole:>9}{_giga(whole_flops):>9}"
        )
    lines.append("")
    paper = data["paper"]
    source = f"the paper's Table {paper['table']}" if "table" in paper else "the paper"
    for name, key, show, figure, printed in (
        ("total", "flops", _total, "flops", "{:.2f} T".format),
        ("ratio to vanilla", "ratio", "{:.0%}".format, "percent", "{:.0f}%".format),
        ("average tokens kept", "average_tokens", "{:.0f}".format, "", str),
    ):
        printed_too = f"   ({source}: {printed(paper[figure])})" if figure in paper else ""
        lines.append(f"{name:<22}{show(nominal[key]):>18}{'':8}{show(actual[key]):>18}{printed_too}")
    return "\n".join([*lines, "", *(f"note: {note}" for note in data["notes"])])


def plot(data: dict, path: str | Path) -> None:
    """Draws tokens and FLOPs of every layer, those of `report`'s dictionary next to vanilla's, into a file.

    Raises ValueError without matplotlib, or where the file's ending is not a picture's.
    """
    figure = new_figure(7, 3)
    layers = range(data["sizes"]["layers"])
    plain = sum(data["visual_tokens"]), data["vanilla_flops"] / len(layers)
    for panel, (key, what, unit) in enumerate(
        (("tokens_per_layer", "visual tokens", 1), ("flops_per_layer", "GFLOPs", 1e9))
    ):
        axes = figure.add_subplot(1, 2, panel + 1)
        axes.step(layers, [plain[panel] / unit] * len(layers), where="mid", color="0.6", label="vanilla")
        axes.step(layers, [x / unit for x in data["actual"][key]], where="mid", label=data["row"])
        axes.set(xlabel="decoder layer", ylabel=f"{what} of the layer", ylim=(0, None))
    axes.legend()
    figure.suptitle(f"{data['model']}: {data['nominal']['ratio']:.0%} of vanilla's FLOPs")
    save(figure, Path(path))


def _describe(c: dict) -> str:
    if "steps" in c:
        return "; ".join(map(_describe, c["steps"]))
    if "select" not in c or c.get("layers") == []:
        return "none (vanilla)"
    name = f"{c['method']}: " if "method" in c else ""
    ratios = c["ratio"] if isinstance(c.get("ratio"), list) else [c.get("ratio", 0)]
    amount = f"keep {c['keep']}" if "keep" in c else f"ratio {', '.join(f'{ratio:.4g}' for ratio in ratios)}"
    if "layers" in c:
        where = f"after layer{'s' if len(c['layers']) > 1 else ''} {', '.join(map(str, c['layers']))}"
    else:
        where = IN_WORDS[c["at"]]
    return f"{name}select {c['select']}, merge {c['merge']}, {amount}, {where}"


def _sequences(lengths: list[int]) -> str:
    if len(lengths) > 1 and len(set(lengths)) == 1:
        return f"{len(lengths)} sequences of {lengths[0]}"
    return " + ".join(map(str, lengths))


def _number(tokens: float) -> str:
    return f"{tokens:.2f}".rstrip("0").rstrip(".")


def _giga(flops: float) -> str:
    return f"{flops / 1e9:.2f}" if flops >= 1e9 else f"{flops / 1e9:.4f}"


def _total(flops: float) -> str:
    """Trillions to two decimals, as the paper prints them; a small model's in billions, which would all be
    0.00."""
    return f"{flops / 1e12:.2f} T" if flops >= 1e11 else f"{flops / 1e9:.2f} G"


def main(argv: list[str] | None = None) -> int:
    """The command line; 0 on success, SystemExit with status 2 after one `error: …` line."""
    parser = Parser(
        takes_plugins=True,
        prog="python -m libra.flops",
        description="FLOPs of a row's visual tokens.",
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="ROW",
        help="a row: its name, such as llava7b_r50, or its YAML file",
    )
    parser.add_argument(
        "--visual-tokens",
        type=whole_from(1),
        metavar="N",
        help="count one sequence of N visual tokens, not the model's own",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON, numbers unrounded")
    parser.add_argument(
        "--plot", metavar="FILE", help="draw tokens and FLOPs by layer, as .png, .svg or .pdf"
    )
    args = parser.parse_args(argv)
    try:
        data = report(Row.from_yaml(args.config), args.visual_tokens)
    except ConfigError as error:
        parser.error(str(error))
    if args.plot:
        try:
            plot(data, args.plot)
        except (ValueError, OSError) as error:
            parser.error(f"--plot: {error}")
        print(f"drew {args.plot}", file=sys.stderr)
    print(json.dumps(data, indent=2, ensure_ascii=False) if args.json else table(data))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
