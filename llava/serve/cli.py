"""A conversation about an image in the terminal: ``python -m llava.serve.cli``."""

import sys

from libra.cli import Parser

from .session import Session, add_options

EXAMPLES = """example:
  python -m llava.serve.cli --model-path mini/checkpoint --image-file photo.png
  python -m llava.serve.cli --model-path liuhaotian/llava-v1.5-7b --image-file photo.png --compression configs/llava7b_r50.yaml

An empty line or the end of input ends the conversation."""


def converse(session: Session, **generation) -> None:
    """Read questions from stdin and stream the answers to stdout until an empty line, the end of input or Ctrl-C.

    A question that cannot be asked is answered with ``error: …`` on stderr and forgotten.
    """
    while True:
        try:
            question = input("USER: ").strip()
            if not question:
                return
            print("ASSISTANT: ", end="", flush=True)
            answer = session.ask(question, stream=True, **generation)
        except (EOFError, KeyboardInterrupt):
            print()
            return
        except ValueError as error:
            print(f"\nerror: {error}", file=sys.stderr)
            continue
        note = session.compression_note()
        if note:
            print(f"[{note}; first token after {answer.first_token:.2f} s]")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m llava.serve.cli", description="Talk about an image in the terminal.", epilog=EXAMPLES)
    add_options(parser)
    args = parser.parse_args(argv)
    try:
        session = Session.load(args)
    except ValueError as error:
        parser.error(str(error))
    converse(session, temperature=args.temperature, top_p=args.top_p, max_new_tokens=args.max_new_tokens)


if __name__ == "__main__":
    main()
