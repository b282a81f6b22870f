"""The command ``python -m libra.serve.bench``: a compressed server against a vanilla one, in turns."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from ..rows import compression_from
from ..utils import plugins
from ..utils.cli import DTYPES, Parser, whole_from, wholes_from
from ..utils.files import write_json
from ..utils.provenance import commit, machine, versions
from .command import check_packages
from .load import Caller, Question, Run
from .rates import SERVERS, picture, rates_from, summary, table

PACKAGES = ("torch", "transformers", "fastapi", "uvicorn", "openai")
SHARES = (0.5, 0.8, 1.0, 1.25)  # of what the vanilla server manages with one client, for the open loop
SIDE = 672  # pixels of a drawn picture
STARTS_WITHIN = 1800.0  # seconds
EXAMPLES = """example:
  python -m libra.serve.bench --compression mini/r50 --output results/serve
  python -m libra.serve.bench --model FOLDER --compression llava7b_r50 --pictures PICTURES"""


def _parser() -> Parser:
    parser = Parser(
        takes_plugins=True,
        prog="python -m libra.serve.bench",
        description="Requests a second and time to the first token, with compression and without, in turns.",
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    add("--model", default="mini", help="folder or hub name (default mini: the embedded model)")
    add("--compression", default="mini/r50", help="method, row or YAML file (default mini/r50)")
    add(
        "--device", default="auto", help="such as cpu or cuda:0; auto (default) takes the GPU if there is one"
    )
    add("--dtype", choices=("auto", *DTYPES), default="auto")
    add("--clients", type=wholes_from(1), default=(1, 2, 4, 8, 16, 32), help="closed loop (1,2,4,8,16,32)")
    add(
        "--rates",
        type=rates_from,
        help="open loop: requests a second, with commas (default: around vanilla's)",
    )
    add("--requests", type=whole_from(1, 100_000), default=48, help="of each load (default 48)")
    add("--turns", type=whole_from(1, 1000), default=3, help="how often each load is repeated (default 3)")
    add("--max-tokens", type=whole_from(1, 10_000), default=16, help="of an answer (default 16)")
    add(
        "--pictures",
        metavar="FOLDER",
        help="what is asked about (default: the benchmark's, else drawn noise)",
    )
    add(
        "--question", default="What is in the picture?", help="asked of pictures that bring none of their own"
    )
    add("--output", type=Path, default=Path("results/serve"), metavar="FOLDER", help="default results/serve")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        check_packages()
        compression_from(args.compression)  # which takes no server to refuse
        questions, source = _questions(args)
        with ExitStack() as stack:
            urls = {name: stack.enter_context(_started(args, name)) for name in SERVERS}
            callers = {name: Caller(url, "none", questions, args.max_tokens) for name, url in urls.items()}
            measured = measure(callers, args.clients, args.rates, args.requests, args.turns)
    except ValueError as error:
        parser.error(str(error))
    about = {name: getattr(args, name) for name in ("model", "compression", "device", "dtype")}
    about |= {
        "requests": args.requests,
        "turns": args.turns,
        "max_tokens": args.max_tokens,
        "pictures": source,
    }
    data = {"settings": about, "commit": commit(), "machine": machine(), "versions": versions(PACKAGES)}
    data |= summary(measured)
    write_json(args.output / "bench.json", data)
    try:
        picture(data, args.output / "bench.png")
    except ValueError as error:  # matplotlib is missing
        print(f"note: no picture: {error}", file=sys.stderr)
    print(table(data))


def measure(
    callers: dict[str, Caller], clients, rates, requests: int, turns: int
) -> list[tuple[str, float, str, Run]]:
    """(loop, clients or rate, server, run) of every load; in each turn the servers change places.

    Args:
        rates: of the open loop; None: ``SHARES`` of the first turn's rate of vanilla with one client.
    """
    found = []
    for caller in callers.values():
        caller.closed(1, 2)  # which warms it up
    if rates is None:
        run = callers[SERVERS[0]].closed(1, requests)
        rates = tuple(round(share * requests / run.seconds, 3) for share in SHARES)
    loads = [("closed", level) for level in clients] + [("open", level) for level in rates]
    for turn in range(turns):
        order = SERVERS if turn % 2 == 0 else SERVERS[::-1]
        for loop, level in loads:
            for name in order:
                caller = callers[name]
                run = (
                    caller.closed(level, requests) if loop == "closed" else caller.open(level, requests, turn)
                )
                found.append((loop, level, name, run))
    return found


@contextmanager
def _started(args, name: str) -> Iterator[str]:
    """The address of a server in a process of its own. Raises ValueError with its last words."""
    command = [
        sys.executable,
        "-m",
        "libra.serve",
        "--port",
        "0",
        "--model",
        args.model,
        "--most-waiting",
        "200",
    ]
    command += ["--device", args.device, "--dtype", args.dtype]
    command += ["--compression", args.compression] if name == "compressed" else []
    command += plugins.flags()
    environment = {key: value for key, value in os.environ.items() if key != "LIBRA_API_KEY"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(process.stderr), daemon=True)
    reader.start()
    watchdog = threading.Timer(STARTS_WITHIN, process.kill)
    watchdog.start()
    try:
        found = re.search(r"http://\S+/v1", process.stdout.readline())
        watchdog.cancel()
        if not found:
            reader.join(5)
            last = said[-1].strip().removeprefix("error: ") if said else "it says nothing"
            raise ValueError(f"the {name} server does not start: {last}")
        yield found[0]
    finally:
        watchdog.cancel()
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _questions(args) -> tuple[list[Question], str]:
    """What is asked, and what it is, in words."""
    from ..media import data_uri, open_image, picture_files

    if args.pictures:
        files = picture_files(args.pictures)[: args.requests]
        pictures = [open_image(file) for file in files]
        return [Question(data_uri(one), args.question) for one in pictures], "pictures of a folder"
    if args.model == "mini":
        try:
            from ..mini.benchmark import scene_sample
            from ..mini.questions import SCENE_TYPES
        except ImportError as error:
            raise ValueError(f"the benchmark's pictures need {error.name}; give --pictures FOLDER") from error
        kinds = list(SCENE_TYPES)
        samples = [scene_sample(kinds[i % len(kinds)], i // len(kinds)) for i in range(args.requests)]
        asked = [Question(data_uri(sample.image), sample.question) for sample in samples]
        return asked, "the embedded benchmark's scenes"
    from PIL import Image

    draw = np.random.default_rng(0)
    noise = (draw.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8) for _ in range(min(args.requests, 16)))
    asked = [Question(data_uri(Image.fromarray(pixels)), args.question) for pixels in noise]
    return asked, f"noise of {SIDE} × {SIDE} pixels"


if __name__ == "__main__":
    main()
