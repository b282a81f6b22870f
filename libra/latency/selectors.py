"""What choosing tokens before the language model costs: python -m libra.latency.selectors --keep 64

Selectors are what makes methods slow that read no attention. Each method's step, choice and merge, is timed on
random tokens in turns with the layers that follow: a slice of the decoder at true width on the tokens that are left,
scaled to all its layers. The share is the step's CPU time over that of the prefill that remains.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from ..config import Compression, ConfigError
from ..methods import METHODS, Context
from ..rows import ModelSpec, get_model
from ..step import compress
from ..utils.cli import Parser, whole_from
from ..utils.devices import find_device
from ..utils.files import write_text
from ..utils.provenance import machine, versions
from ..utils.timing import median_interval, now, run_in_turns
from .random_weights import random_model

KEYS_WIDTH, FEATURES_WIDTH = 64, 1024  # of CLIP ViT-L/14, the tower of the LLaVA models
TEXT = 64  # tokens of a question


def context_of(tokens: int, side: tuple[int, int], dtype: torch.dtype, device) -> Context:
    """Random numbers in place of what a tower says about one picture."""
    draw = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.rand(*shape, generator=draw).to(device)

    return Context(
        tower_cls=random(1, tokens),
        tower_received=random(2, 1, tokens),
        tower_keys=random(1, tokens, KEYS_WIDTH),
        tower_hidden=random(1, tokens, FEATURES_WIDTH).to(dtype),
        relevance=random(1, tokens),
        grid=[[side]],
    )


def grid_of(tokens: int) -> tuple[int, int]:
    """The most square grid of so many places."""
    height = next(h for h in range(int(tokens**0.5), 0, -1) if tokens % h == 0)
    return height, tokens // height


@torch.inference_mode()
def shares(
    spec: ModelSpec, tokens: int, keep: int, dtype: torch.dtype, device, pairs: int, layers: int = 1
) -> dict[str, dict[str, float]]:
    """For each method that works before the language model: ``step`` and ``prefill``, median CPU milliseconds (of
    the clock on a GPU), and ``share``, the median of their quotients.

    The prefill is that of ``keep`` visual and some text tokens through ``spec.layers`` layers, scaled from a slice
    of ``layers``; a first round is left out.
    """
    hidden = torch.randn(1, tokens, spec.hidden_size, generator=torch.Generator().manual_seed(1))
    hidden, context = hidden.to(device, dtype), context_of(tokens, grid_of(tokens), dtype, device)
    decoder = random_model(spec, layers, dtype, device).model.language_model
    rest = hidden[:, : keep + TEXT] if keep + TEXT <= tokens else hidden

    def timed(run: Callable[[], object]) -> float:
        start = now(torch.device(device))
        run()
        spent = now(torch.device(device)).since(start)
        return 1000 * (spent.wall if torch.device(device).type == "cuda" else spent.cpu)

    ways: dict[str, Callable[[], float]] = {
        "": partial(timed, lambda: decoder(inputs_embeds=rest, use_cache=False))
    }
    for name, method in METHODS.items():
        if method.place != "layers":
            c = Compression(method=name, keep=keep)
            ways[name] = partial(timed, partial(compress, hidden, None, c, context=context))
    rounds = run_in_turns(ways, pairs + 1)[1:]
    scale = spec.layers / layers
    return {
        name: {
            "step": median_interval([one[name] for one in rounds]).median,
            "prefill": scale * median_interval([one[""] for one in rounds]).median,
            "share": median_interval([one[name] / (scale * one[""]) for one in rounds]).median,
        }
        for name in ways
        if name
    }


def table(found: dict[str, dict[str, float]]) -> str:
    """The readable form of :func:`shares`' dictionary."""
    lines = [f"{'method':<14}{'step':>10}{'prefill left':>15}{'share':>9}"]
    for name, row in found.items():
        lines.append(f"{name:<14}{row['step']:>7.1f} ms{row['prefill']:>12.0f} ms{100 * row['share']:>8.2f}%")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command line; 0 on success, SystemExit with status 2 after one `error: …` line."""
    parser = Parser(prog="python -m libra.latency.selectors", description=__doc__.partition("\n\n")[2])
    add = parser.add_argument
    add(
        "--model",
        default="llava-1.5-7b",
        metavar="NAME",
        help="a model of the registry (default %(default)s)",
    )
    add("--visual-tokens", type=whole_from(2), default=576, metavar="N", help="(default %(default)s)")
    add(
        "--keep",
        type=whole_from(1),
        default=64,
        metavar="N",
        help="tokens that are left (default %(default)s)",
    )
    add("--layers", type=whole_from(1), default=1, metavar="N", help="of the slice (default %(default)s)")
    add("--pairs", type=whole_from(1), default=5, metavar="N", help="rounds (default %(default)s)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    add("--device", help="such as cpu or cuda:0 (default: the GPU where there is one)")
    add("--json", type=Path, metavar="FILE", help="also write everything there")
    args = parser.parse_args(argv)
    try:
        spec = get_model(args.model)
        if args.keep >= args.visual_tokens:
            raise ConfigError(f"--keep: {args.keep} of {args.visual_tokens} tokens leave nothing to choose")
        device = find_device(args.device)
        dtype = getattr(torch, args.dtype)
        found = shares(spec, args.visual_tokens, args.keep, dtype, device, args.pairs, args.layers)
    except ValueError as error:
        parser.error(str(error))
    print(
        f"{spec.name}: {args.visual_tokens} visual tokens to {args.keep}, {TEXT} of text, {args.dtype}, {device}"
    )
    print(table(found))
    if args.json:
        about = {"machine": machine(), "versions": versions(("torch",)), "arguments": vars(args)}
        write_text(args.json, json.dumps({**about, "methods": found}, indent=2, default=str) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
