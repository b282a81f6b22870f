"""A page that answers a question about an image with and without compression: ``python -m
llava.serve.web``."""

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from libra.utils.cli import Parser, whole_from
from libra.utils.files import remove_folder
from libra.utils.server import ends_in_time, is_local, listen, names_of, serve

from .options import add_model_options

SWEEP_SECONDS = 30
EXAMPLES = """example:
  %(prog)s
  %(prog)s --model-path liuhaotian/llava-v1.5-7b --port 8000

Without --model-path it shows the embedded model, which knows handwritten digits and coloured shapes."""


def _parser(prog: str) -> Parser:
    parser = Parser(
        takes_plugins=True,
        prog=prog,
        description="Compare answers with and without compression in a browser.",
        epilog=EXAMPLES,
    )
    add_model_options(parser, model_path="mini")
    parser.set_defaults(max_new_tokens=128)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1: only this machine)")
    add(
        "--port",
        type=whole_from(0, 65_535),
        default=7860,
        help="port to listen at (default 7860; 0 takes a free one)",
    )
    add(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="another name by which browsers call this server, e.g. behind a proxy; may be repeated",
    )
    add(
        "--per-minute",
        type=whole_from(1),
        default=120,
        help="requests a minute from one address (default 120)",
    )
    return parser


def main(
    argv: list[str] | None = None,
    prog: str = "python -m llava.serve.web",
    examples: Callable[[Path], list[list[str]]] = lambda folder: [],
) -> None:
    """The command line. ``examples`` writes pictures to a folder and returns [file, question] of each."""
    parser = _parser(prog)
    args = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="libra-web-"))
    os.environ.update(
        GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1", GRADIO_TEMP_DIR=str(folder)
    )
    with ends_in_time(lambda: remove_folder(folder)) as start_clock:
        try:
            import gradio  # noqa: F401
            import uvicorn  # noqa: F401
        except ImportError as error:
            parser.error(f"the page needs gradio ({error}); install it: pip install gradio")
        try:
            from .page import build_app, build_page, warm_up
            from .session import load_model
            from .uploads import Uploads

            server = listen(args.host, args.port)
            loaded = load_model(args)
            uploads = Uploads(folder)
            page = build_page(loaded, args.model_path, args.max_new_tokens, uploads, examples(folder))
        except ValueError as error:
            parser.error(str(error))
        uploads.keep()
        uploads.sweep_every(SWEEP_SECONDS)
        warm_up(loaded)
        host, port = server.getsockname()[:2]
        if not is_local(args.host):
            print(
                f"warning: whoever reaches {host}:{port} can use this page; it asks for no password",
                file=sys.stderr,
            )
        print(
            f"open http://{f'[{host}]' if ':' in host else host}:{port} in a browser; Ctrl-C ends", flush=True
        )
        hosts = [*names_of(args.host), *args.allow_host]
        serve(build_app(page, uploads, hosts, args.per_minute), server, start_clock)


if __name__ == "__main__":
    main()
