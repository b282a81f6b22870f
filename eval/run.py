"""Fill a table's cells, and go on where an earlier run stopped: python -m eval.run --table 1"""

import fcntl
import shlex
import sys
import time
from pathlib import Path

from libra.utils import plugins
from libra.utils.cli import DTYPES, Parser, names, whole_from
from libra.utils.files import write_json
from libra.utils.other_llava import warn_if_llava_is_another
from libra.utils.provenance import cores, require_clean

from .filling import fill
from .harness import Harness, Settings
from .options import add_benchmark, add_checkpoint, add_own, add_servers, add_tasks
from .own import Own, model_of
from .plan import PUBLISHED, Wanted, describe, plan
from .pool import PoolError
from .served import ServedHarness, Server, ask_all
from .suites import OWN, SUITES, TABLES, from_harness, get_table

EXAMPLES = """examples:
  python -m eval.run --table 1                            all rows of the embedded model
  python -m eval.run --table 1 --rows vanilla,r50 --limit 20 --output results/try
  python -m eval.run --table 3 --dry-run                  what Table 3 takes: rows, FLOPs, cells, hours
  python -m eval.run --table 1 --suite llava7b            the real checkpoint, downloaded from the hub
  python -m eval.run --model mine=out/llava:vicuna_v1 --configs my_rows --include-path my_tasks
  python -m eval.run --table 1 --server http://a:8000,http://b:8000   OpenAI-compatible servers answer"""


def parser() -> Parser:
    whole = whole_from(1)
    parser = Parser(
        takes_plugins=True,
        prog="python -m eval.run",
        description="Fill a table's cells; finished ones are kept.",
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "--table",
        choices=[*TABLES, OWN.name],
        help="a table of the paper, E (training with compression), the arena, the field, or own: the rows of"
        " --configs only",
    )
    parser.add_argument(
        "--suite", choices=list(SUITES), default="mini", help="which model's rows (default %(default)s)"
    )
    parser.add_argument("--rows", type=names, metavar="A,B", help="only these rows, such as vanilla,r50")
    parser.add_argument(
        "words", nargs="*", metavar="[SUITE] [ROW …]", help="the same in words, such as llava7b r50"
    )
    add_tasks(parser)
    parser.add_argument(
        "--limit", type=whole, metavar="N", help="only the first N samples of a task (to try things out)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="only say what would be computed, at what FLOPs and how long"
    )
    parser.add_argument(
        "--batch-size", type=whole, metavar="N", help="samples a forward call (default: 32 mini, 8 others)"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="results folder (default results/tableN)")
    add_own(parser)
    add_benchmark(parser)
    parser.add_argument(
        "--processes",
        type=whole,
        metavar="N",
        help="workers, each with one cell at a time (default: one a GPU; on a CPU 2, of two cores or more)",
    )
    add_checkpoint(parser)
    parser.add_argument(
        "--trained",
        type=Path,
        metavar="DIR",
        help="Table E: folder of the fine-tuned checkpoints, as python -m mini.finetune makes it",
    )
    parser.add_argument(
        "--device",
        type=names,
        metavar="A,B",
        help="such as cpu, cuda:0 or cuda:0,cuda:1; workers take them in turn (default: all GPUs, else cpu)",
    )
    add_servers(parser)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--publish", action="store_true", help="copy the finished table to docs/results/")
    return parser


def worker_devices(named: list[str] | None, processes: int | None) -> list[str]:
    """The device, or server, of each worker."""
    if not named:
        from libra.utils.devices import all_devices  # here: it needs torch, and --help does not

        named = all_devices()
    wanted = processes or (min(2, cores()) if named == ["cpu"] else len(named))
    return [named[i % len(named)] for i in range(wanted)]


def command(args) -> str:
    """The command line that computes the same cells."""
    words = ["python", "-m", "eval.run", "--table", args.table]
    words += ["--model", args.model] if args.model else ["--suite", args.suite]
    for name in ("rows", "tasks", "server"):
        if getattr(args, name):
            words += [f"--{name}", ",".join(getattr(args, name))]
    for name in ("limit", "checkpoint", "trained", "batch_size", "configs", "include_path"):
        if getattr(args, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    if args.dtype != "float32":
        words += ["--dtype", args.dtype]
    words += plugins.flags()
    return shlex.join(words)


def servers(args) -> list[Server]:
    """Those that are to answer, asked what they are; none without --server.

    Raises ValueError for one that does not answer, and for options that are the servers' to choose.
    """
    for name, default in (("checkpoint", None), ("trained", None), ("device", None), ("dtype", "float32")):
        if args.server and getattr(args, name) != default:
            raise ValueError(f"--{name} is the servers' to choose: leave it out, or --server")
    return ask_all(args.server) if args.server else []


def wanted(args) -> Wanted:
    return Wanted(
        servers=servers(args),
        rows=args.rows,
        tasks=args.tasks or (),
        limit=args.limit,
        checkpoint=args.checkpoint,
        benchmark=args.benchmark,
        dtype=args.dtype,
        dry=args.dry_run,
        trained=args.trained,
        configs=args.configs,
    )


def brought(args) -> Own:
    """What the user brings, known in this process from now on; sets the table and the suite that follow.

    Raises:
        ValueError: for a model, a folder or a table that does not fit.
    """
    models = (model_of(args.model),) if args.model else ()
    if models:
        args.table, args.suite = args.table or OWN.name, models[0].name
    if args.table is None:
        raise ValueError("--table is missing; use one of " + ", ".join([*TABLES, OWN.name]))
    if models and args.table != OWN.name:
        raise ValueError(f"--model fills the table {OWN.name}: leave out --table {args.table}")
    if args.table == OWN.name and args.configs is None:
        raise ValueError(f"the table {OWN.name} has your rows only: name their folder with --configs")
    own = Own(models, args.configs, args.include_path, args.table)
    own.apply()
    return own


def settings(args, output: Path, devices: list[str], own: Own, defaults: bool) -> Settings:
    """Of the workers, the cores shared among them."""
    return Settings(
        output=str(output.resolve()),
        device=devices[0],
        threads=max(1, cores() // len(devices)),
        batch_size=args.batch_size or (32 if args.suite == "mini" else 8),
        dtype=args.dtype,
        online=args.suite != "mini",
        plugins=plugins.loaded(),
        own=own,
        defaults=defaults,
    )


def main(argv: list[str] | None = None) -> int:
    """0 when every cell is filled, 1 when some failed (the table says which), 2 after one `error: …` line."""
    options = parser()
    args = options.parse_intermixed_args(argv)
    if args.words[:1] and args.words[0] in SUITES:
        args.suite = args.words.pop(0)
    args.rows = [*(args.rows or []), *args.words]
    warn_if_llava_is_another()  # here, because what a worker prints goes to its log
    started = time.monotonic()
    try:
        own = brought(args)
        table = get_table(args.table)
        output = args.output or Path("results") / table.stem
        devices = worker_devices(args.server or args.device, args.processes)
        if args.publish:
            require_clean()  # not after hours
        todo = plan(table, args.suite, wanted(args))
        if args.dry_run:
            print(describe(todo, output, len(devices)))
            return 0
        output.mkdir(parents=True, exist_ok=True)
        with open(output / ".lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"another run is filling {output}: wait for it, or choose another --output"
                ) from None
            if todo.manifest is not None:
                write_json(output / "benchmark.json", todo.manifest)
            own.save(output)
            how = settings(args, output, devices, own, any(from_harness(cell.task) for cell in todo.cells))
            worker = ServedHarness if args.server else Harness
            failed, unwritten = fill(todo.cells, todo.manifest, output, how, devices, command(args), worker)
            from .report import write_report

            text = write_report(output, table, PUBLISHED if args.publish else None, unwritten, todo)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except (ValueError, OSError, PoolError) as error:
        options.error(str(error))
    print(text)
    seconds = time.monotonic() - started
    print(
        f"{len(todo.cells)} cells, {failed} failed, {seconds:.0f} s; table: {output / table.stem}.md",
        file=sys.stderr,
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
