"""Train a LLaVA model: python -m llava.train.train --help"""

import glob
import os
import sys
import warnings
from pathlib import Path

if __package__ in (None, ""):  # started by its path, as DeepSpeed's launcher and the published scripts do
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from llava.train.flags import help_text


def silence_libraries() -> None:
    """Of what they say in every run: transformers' remarks on its own older names, and DeepSpeed's on a
    missing GPU."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    if not glob.glob("/dev/nvidia*") and not glob.glob("/dev/dri/*"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    if "-h" in words or "--help" in words:
        print(help_text(), end="")
        return
    silence_libraries()
    try:
        from llava.train.recipe import train
    except ValueError as error:  # another version of transformers than this needs
        sys.exit(f"error: {error}")
    train(words)


if __name__ == "__main__":
    main()
