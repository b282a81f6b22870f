"""A conversation about images or videos in the terminal: ``python -m llava.serve.cli``."""

import re
import sys
from typing import TYPE_CHECKING

from libra.utils.cli import Parser

from .options import add_options

if TYPE_CHECKING:
    from .session import Session

EXAMPLES = """example:
  python -m llava.serve.cli --model-path mini/checkpoint --image-file photo.png
  python -m llava.serve.cli --model-path liuhaotian/llava-v1.5-7b --image-file photo.png \\
      --compression configs/llava7b_r50.yaml

An empty line or the end of input ends the conversation; /help lists what else can be typed."""

COMMANDS = """/image FILE   show an image (file or http(s) address) with the next question
/video FILE   show a video (file or folder of frames) with the next question
/new          forget the conversation and its images
/help         this list
(empty line)  end"""


def obey(session: "Session", line: str) -> None:
    """Do what a line that begins with ``/`` says.

    Raises:
        ValueError: for an unknown command, or a file that cannot be shown.
    """
    command, _, name = line.partition(" ")
    if command in ("/image", "/video") and name:
        picture = session.show(name.strip(), command[1:])
        print(f"[{name.strip()}: {picture.tokens} visual tokens, shown with the next question]")
    elif command == "/new" and not name:
        session.restart()
        print("[a new conversation]")
    elif command == "/help":
        print(COMMANDS)
    else:
        raise ValueError(f"{line} is not a command; they are /image FILE, /video FILE, /new and /help")


def converse(session: "Session", **generation) -> None:
    """Read questions and commands from stdin, stream the answers to stdout; an empty line, the end of input
    or Ctrl-C ends it.

    What cannot be asked or shown is answered with ``error: …`` on stderr and forgotten.
    """
    while True:
        try:
            line = input("USER: ").strip()
            if not line:
                return
            if re.match(r"/[a-z]+( |$)", line):
                obey(session, line)
                continue
            print("ASSISTANT: ", end="", flush=True)
            answer = session.ask(line, stream=True, **generation)
        except (EOFError, KeyboardInterrupt):
            print()
            return
        except ValueError as error:
            print(flush=True)
            print(f"error: {error}", file=sys.stderr)
            continue
        notes = [session.tokens_note(), f"first token after {answer.first_token:.2f} s"]
        if answer.reread:
            notes.append(
                "the whole conversation was read again: its text does not go on from what was cached"
            )
        print(f"[{'; '.join(note for note in notes if note)}]")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        takes_plugins=True,
        prog="python -m llava.serve.cli",
        description="Talk about images or videos in the terminal.",
        epilog=EXAMPLES,
    )
    add_options(parser)
    parser.add_argument(
        "--reprefill",
        action="store_true",
        help="run the whole conversation again for every question, so that compression follows the newest "
        "one",
    )
    args = parser.parse_args(argv)
    from .session import Session

    try:
        session = Session.load(args)
    except ValueError as error:
        parser.error(str(error))
    converse(session, temperature=args.temperature, top_p=args.top_p, max_new_tokens=args.max_new_tokens)


if __name__ == "__main__":
    main()
