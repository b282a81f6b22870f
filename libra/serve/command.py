"""The command ``python -m libra.serve``."""

import os
import sys
from importlib import metadata

from ..config import NOTHING
from ..rows import compression_from
from ..utils.cli import DTYPES, Parser, whole_from
from ..utils.server import address_of, ends_in_time, is_local, listen, names_of, serve

TRANSFORMERS = (
    "5.23",
    "5.24",
)  # from the first, below the second: the server's classes are no public interface
KEY = "LIBRA_API_KEY"
GRACE = 2  # seconds for answers that have begun, after SIGTERM
EXAMPLES = """example:
  python -m libra.serve --compression mini/r50                        # the embedded model, at http://127.0.0.1:8000/v1
  python -m libra.serve --model llava-hf/llava-1.5-7b-hf --compression llava7b_r50 --dtype float16

One process answers one picture request at a time; docs/serving.md says how to run several behind a proxy."""


def check_packages() -> None:
    """Raises ValueError, in one sentence, where transformers' server cannot run here."""
    found = metadata.version("transformers")
    low, high = (tuple(map(int, bound.split("."))) for bound in TRANSFORMERS)
    if not low <= tuple(int(part) for part in found.split(".")[:2]) < high:
        raise ValueError(
            f"the server needs transformers from {TRANSFORMERS[0]} up and below {TRANSFORMERS[1]}, and this"
            f" is {found}; install it: pip install 'transformers>={TRANSFORMERS[0]},<{TRANSFORMERS[1]}'"
        )
    try:
        import fastapi  # noqa: F401
        import openai  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(f"the server needs fastapi, uvicorn and openai ({error}); install them: pip install"
                         " 'libra-merging[serve]'") from error  # fmt: skip


def _parser() -> Parser:
    parser = Parser(
        takes_plugins=True,
        prog="python -m libra.serve",
        description="Serve a vision-language model with compressed visual tokens, as OpenAI's chat API.",
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    add(
        "--model",
        default="mini",
        help="folder or hub name, in transformers' or LLaVA's format (default mini: embedded)",
    )
    add(
        "--compression",
        metavar="NAME|ROW|YAML",
        help="of requests that name none: a method, a row or a file (default: none)",
    )
    add(
        "--served-name",
        metavar="NAME",
        help="what requests call the model (default: its folder's or hub name)",
    )
    add("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1: this machine only)")
    add(
        "--port",
        type=whole_from(0, 65_535),
        default=8000,
        help="port to listen at (default 8000; 0 takes a free one)",
    )
    add(
        "--device",
        default="auto",
        help="such as cpu or cuda:0; auto (default) takes the GPU where there is one",
    )
    add(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="auto: the checkpoint's own, float32 on a CPU",
    )
    _add_access(add)
    return parser


def _add_access(add) -> None:
    """Who may ask, and how much."""
    add("--api-key", help=f"what clients must send as their key (default: the variable {KEY}, or none)")
    add(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="another name of this server, e.g. behind a proxy; may be repeated",
    )
    add(
        "--allow-origin",
        action="append",
        default=[],
        metavar="URL",
        help="a site whose pages may ask, e.g. https://chat.example; may be repeated",
    )
    add(
        "--fetch",
        action="store_true",
        help="fetch pictures from public http(s) addresses (default: data URIs only)",
    )
    add("--per-minute", type=whole_from(1), help="requests a minute from one address (default: any number)")
    add(
        "--most-waiting",
        type=whole_from(1, 200),
        default=64,
        help="requests that wait or run at a time; more get 429 (default 64)",
    )
    add(
        "--max-tokens",
        type=whole_from(1),
        default=512,
        help="of an answer whose request names no limit (default 512)",
    )


def main(argv: list[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    with ends_in_time(lambda: None) as start_clock:
        try:
            check_packages()
            listener = listen(args.host, args.port)
            app, name = _build(args)
        except ValueError as error:
            parser.error(str(error))
        address = address_of(listener)
        if not is_local(args.host) and not _key(args):
            print(
                f"warning: whoever reaches {address} can use this server; --api-key asks for a key",
                file=sys.stderr,
            )
        print(f"{name} is served at http://{address}/v1, one request at a time; Ctrl-C ends", flush=True)
        serve(app, listener, start_clock, GRACE)


def _key(args) -> str | None:
    return args.api_key or os.environ.get(KEY) or None


def _build(args):
    """The application and the model's name. Raises ValueError."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    from .app import Rules, build_app
    from .handler import ChatHandler
    from .metrics import Metrics
    from .models import load
    from .pictures import limits_of
    from .worker import Worker

    default = compression_from(args.compression) if args.compression else NOTHING
    model = load(args.model, args.served_name, args.device, args.dtype)
    metrics = Metrics()
    worker = Worker(model.model, model.processor.tokenizer, default, args.most_waiting, metrics)
    worker.thread.submit(worker.attach, default).result()
    handler = ChatHandler(model, worker, limits_of(args.fetch), args.max_tokens)
    hosts = [*names_of(args.host), *args.allow_host]
    rules = Rules(hosts, args.allow_origin, args.per_minute, _key(args))
    return build_app(model, handler, metrics, rules), model.name
