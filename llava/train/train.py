"""Train a LLaVA model: python -m llava.train.train --help"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # started by its path, as DeepSpeed's launcher and the published scripts do
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from llava.train.flags import help_text


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    if "-h" in words or "--help" in words:
        print(help_text(), end="")
        return
    try:
        from llava.train.recipe import train
    except ValueError as error:  # another version of transformers than this needs
        sys.exit(f"error: {error}")
    train(words)


if __name__ == "__main__":
    main()
