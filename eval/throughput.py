"""Samples a second through lmms-eval, each row at each batch size, in turns: python -m eval.throughput
--batch-sizes 1,8"""

import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

from tqdm import tqdm

from libra.utils import plugins
from libra.utils.cli import DTYPES, Parser, names, whole_from, wholes_from
from libra.utils.files import write_json
from libra.utils.provenance import commit, cores, machine, versions

from .cells import PACKAGES
from .formats import text_table
from .harness import Harness, Settings
from .options import add_benchmark, add_checkpoint, add_tasks
from .plan import Wanted, plan
from .run import worker_devices
from .suites import SUITES, get_table

EXAMPLES = """examples:
  python -m eval.throughput --batch-sizes 1,8,32 --limit 64
  python -m eval.throughput --suite llava7b --rows vanilla,r50,fastv --tasks gqa \\
      --limit 200 --dtype bfloat16"""


def measure(
    cells: dict, sizes: Sequence[int], repeats: int, settings: Settings
) -> dict[str, dict[int, list[float]]]:
    """Row → batch size → samples a second of each repeat, from the harness's image to the text, in one
    process.

    cells: row → its cells. Each repeat goes through all rows and sizes, every other one backwards.
    """
    from libra.utils.timing import run_warm_in_turns  # here: it needs torch, and --help does not

    harness = Harness(settings)

    def rate(name: str, size: int) -> float:
        samples = seconds = 0
        for cell in cells[name]:
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
                harness.load(cell).batch_size = size
                result = harness(cell, lambda count: None)
            cell.samples_path(Path(settings.output)).unlink()  # or the next repeat would find its answers
            samples, seconds = samples + result["n"], seconds + result["seconds"]
        return samples / seconds

    ways = {(name, size): partial(rate, name, size) for name, size in product(cells, sizes)}
    with tqdm(total=(repeats + 1) * len(ways), unit=" runs") as bar:
        runs = run_warm_in_turns(ways, repeats, lambda _: bar.update())
    return {name: {size: [run[name, size] for run in runs] for size in sizes} for name in cells}


def table(found: dict[str, dict[int, list[float]]]) -> str:
    """Medians with the lowest and the highest, and each row against the first at the same batch size."""
    first = next(iter(found.values()))
    rows = []
    for name, by_size in found.items():
        for size, rates in by_size.items():
            rate, least = median(rates), median(by_size[min(by_size)])
            rows.append(
                [
                    name,
                    str(size),
                    f"{rate:.2f}",
                    f"{min(rates):.2f} to {max(rates):.2f}",
                    f"{rate / least:.2f} ×",
                    f"{rate / median(first[size]):.2f} ×",
                ]
            )
    header = [
        "row",
        "batch",
        "samples/s",
        "range",
        "against the smallest batch",
        f"against {next(iter(found))}",
    ]
    return "\n".join(text_table(header, rows))


def parser() -> Parser:
    parser = Parser(
        takes_plugins=True,
        prog="python -m eval.throughput",
        description="Samples a second through lmms-eval.",
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "--suite", choices=list(SUITES), default="mini", help="which model's rows (default %(default)s)"
    )
    parser.add_argument(
        "--rows",
        type=names,
        default=["vanilla", "r50"],
        metavar="A,B",
        help="Table 1's (default vanilla,r50)",
    )
    add_tasks(parser)
    parser.add_argument(
        "--batch-sizes", type=wholes_from(1), default=(1, 8), metavar="A,B", help="(default 1,8)"
    )
    parser.add_argument(
        "--limit", type=whole_from(1), default=64, metavar="N", help="samples of a task (default %(default)s)"
    )
    parser.add_argument(
        "--repeats", type=whole_from(1), default=3, metavar="N", help="of everything (default %(default)s)"
    )
    add_checkpoint(parser)
    add_benchmark(parser)
    parser.add_argument(
        "--device", type=names, help="such as cpu or cuda:0 (default: the first GPU, else cpu)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything there")
    return parser


def main(argv: list[str] | None = None) -> int:
    """0, or SystemExit with status 2 after one `error: …` line."""
    options = parser()
    args = options.parse_args(argv)
    try:
        todo = plan(
            get_table("1"),
            args.suite,
            Wanted(args.rows, args.tasks or (), args.limit, args.checkpoint, args.benchmark, args.dtype),
        )
        cells: dict = {}
        for cell in todo.cells:
            cells.setdefault(cell.row, []).append(cell)
        with tempfile.TemporaryDirectory() as folder:
            settings = Settings(
                output=folder,
                device=worker_devices(args.device, 1)[0],
                threads=cores(),
                batch_size=1,
                dtype=args.dtype,
                online=args.suite != "mini",
                plugins=plugins.loaded(),
            )
            found = measure(cells, args.batch_sizes, args.repeats, settings)
        if args.json:
            origin = {
                "commit": commit(),
                "machine": {**machine(), "device": settings.device},
                "versions": versions(PACKAGES),
            }
            settings_of = {name: [cell.settings for cell in own] for name, own in cells.items()}
            data = {"samples_a_second": found, "limit": args.limit, "settings": settings_of, **origin}
            write_json(args.json, data)
    except (ValueError, OSError) as error:
        options.error(str(error))
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
