"""The page that compares answers with all visual tokens and with a part of them: ``python -m
llava.serve.web``."""

import sys
from collections.abc import Callable

from libra.utils.cli import Parser, whole_from
from libra.utils.server import address_of, ends_in_time, is_local, listen, names_of, serve

from .options import add_model_options

EXAMPLES = """example:
  %(prog)s
  %(prog)s --model liuhaotian/llava-v1.5-7b --port 8000
  %(prog)s --model Qwen/Qwen2-VL-2B-Instruct

Without --model it shows the embedded model, which knows handwritten digits and coloured shapes. A model is in
LLaVA's own format, or any of transformers' that libra.attach supports."""


def _parser(prog: str) -> Parser:
    parser = Parser(
        takes_plugins=True,
        prog=prog,
        description="Compare answers with all visual tokens and with a part of them in a browser.",
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
    examples: Callable[[], list] = list,
) -> None:
    """The command line. ``examples`` returns a :class:`llava.serve.asked.Example` for each picture to try."""
    parser = _parser(prog)
    args = parser.parse_args(argv)
    with ends_in_time(lambda: None) as start_clock:
        try:
            import starlette  # noqa: F401
            import uvicorn  # noqa: F401
        except ImportError as error:
            parser.error(
                f"the page needs starlette and uvicorn ({error}); install them: pip install starlette uvicorn"
            )
        try:
            from .page import Desk, build_app
            from .speakers import load

            server = listen(args.host, args.port)
            desk = Desk(load(args), args.model_path, args.max_new_tokens, examples())
        except ValueError as error:
            parser.error(str(error))
        shown = desk.warm_up()
        address = address_of(server)
        if not is_local(args.host):
            print(
                f"warning: whoever reaches {address} can use this page; it asks for no password",
                file=sys.stderr,
            )
        print(f"open http://{address} in a browser; Ctrl-C ends", flush=True)
        hosts = [*names_of(args.host), *args.allow_host]
        serve(build_app(desk, shown, hosts, args.per_minute), server, start_clock)


if __name__ == "__main__":
    main()
