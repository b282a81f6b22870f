"""Tower, selection and prefill of every method: python -m libra.latency.methods --json methods.json

Each method answers one picture in a slice of the model at true width with random weights: methods before
the language model keep --keep tokens of it, those between layers remove --ratio at each of their natural
places. They run in turns with the plain model, every round in the other direction. *tower* is the vision
tower with its projector and all that a method reads in it, *selection* the method's own step (choice, merge
and moving what is kept, from a profiled run), *prefill* the language model without it. With --json a run that
was stopped goes on.
"""

import json
from pathlib import Path

from ..config import Compression, ConfigError
from ..methods import METHODS
from ..places import LAYERS
from ..rows import get_model
from ..utils import numbers as units
from ..utils.cli import DTYPES, Parser, names, whole_from

VANILLA = "vanilla"
HEAD = f"{'method':<16}{'kept':<14}{'where':<30}{'tower':>9}{'selection':>11}{'prefill':>9}{'together':>10}"


def compressions(wanted: list[str] | None, keep: int, ratio: str, layers: int) -> dict[str, Compression]:
    """The compression of each method in a slice of ``layers``. Raises ConfigError."""
    found, known = {}, [name for name, method in METHODS.items() if method.compresses]
    for name in wanted or known:
        if name not in known:
            raise ConfigError(f"--methods: {name} is not a method that compresses; use {', '.join(known)}")
        early = METHODS[name].place != LAYERS
        c = Compression.from_dict({"method": name} | ({"keep": keep} if early else {"ratio": ratio}))
        found[name] = c.at_depth(layers)
    return found


def table(found: dict[str, dict]) -> str:
    """The readable form of :func:`libra.latency.method_cost.summary`."""
    lines = [f"{HEAD}{'of vanilla':>12}"]
    for name, row in found.items():
        if "failed" in row:
            lines.append(f"{name:<16}{row['failed']}")
            continue
        times = (units.seconds(row["tower"]), f"{1000 * row['selection']:.1f} ms")
        after = (units.seconds(row["prefill"]), units.seconds(row["together"]))
        lines.append(
            f"{name:<16}{row['amount']:<14}{row['where']:<30}{times[0]:>9}{times[1]:>11}{after[0]:>9}"
            f"{after[1]:>10}{row['ratio']:>12.3f}"
        )
    return "\n".join(lines)


def parser() -> Parser:
    parser = Parser(
        takes_plugins=True,
        prog="python -m libra.latency.methods",
        description=__doc__.partition("\n\n")[2],
    )
    add, default = parser.add_argument, "(default %(default)s)"
    add("--methods", type=names, metavar="A,B", help="only these (default: all)")
    add("--model", default="llava-1.5-7b", metavar="NAME", help=f"a model of the registry {default}")
    add("--layers", type=whole_from(1), default=8, metavar="N", help=f"of the slice {default}")
    add("--keep", type=whole_from(1), default=64, metavar="N", help=default)
    add("--ratio", default="2/3", metavar="R", help=default)
    add("--pairs", type=whole_from(1), default=3, metavar="N", help=f"rounds {default}")
    add("--text-tokens", type=whole_from(2), default=64, metavar="N", help=default)
    add("--dtype", choices=DTYPES, default="bfloat16")
    add("--device", help="such as cpu or cuda:0 (default: the GPU where there is one)")
    add("--threads", type=whole_from(1), metavar="N", help="CPU threads (default: torch's own choice)")
    add("--json", type=Path, metavar="FILE", help="all figures, written after every round")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line; 0 on success, SystemExit with status 2 after one `error: …` line."""
    options = parser()
    args = options.parse_args(argv)
    try:
        spec = get_model(args.model)
        ways = compressions(args.methods, args.keep, args.ratio, args.layers)
        from .method_cost import run

        found = run(args, spec, ways)
    except KeyboardInterrupt:
        options.error("stopped; with --json the finished rounds are kept, and the same command goes on")
    except (ValueError, OSError, json.JSONDecodeError) as error:
        options.error(str(error))
    print(table(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
