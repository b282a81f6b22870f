"""What choosing tokens before the language model costs: python -m libra.latency.selectors --keep 64

Selectors are what makes methods slow that read no attention. Each method's step, choice and merge, is timed
on random tokens in turns with the layers that follow: a slice of the decoder at true width on the tokens that
are left, scaled to all its layers. The share is the step's CPU time over that of the prefill that remains.
"""

import json
from pathlib import Path

from ..config import ConfigError
from ..rows import get_model
from ..utils.cli import DTYPES, Parser, whole_from

TEXT = 64  # tokens of a question


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
    add("--dtype", choices=DTYPES, default="bfloat16")
    add("--device", help="such as cpu or cuda:0 (default: the GPU where there is one)")
    add("--json", type=Path, metavar="FILE", help="also write everything there")
    args = parser.parse_args(argv)
    import torch  # not before the help is shown

    from ..utils.devices import find_device
    from ..utils.files import write_text
    from ..utils.provenance import machine, versions
    from .selector_cost import shares

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
        f"{spec.name}: {args.visual_tokens} visual tokens to {args.keep}, {TEXT} of text, {args.dtype},"
        f" {device}"
    )
    print(table(found))
    if args.json:
        about = {"machine": machine(), "versions": versions(("torch",)), "arguments": vars(args)}
        write_text(args.json, json.dumps({**about, "methods": found}, indent=2, default=str) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
