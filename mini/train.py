"""Train the embedded model from nothing: ``torchrun --nproc_per_node 2 -m mini.train --output DIR``."""

from pathlib import Path

from libra.utils.cli import Parser, whole_from


def main() -> None:
    parser = Parser(prog="python -m mini.train", description=__doc__)
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for the finished checkpoint and its working files"
    )
    parser.add_argument("--seed", type=whole_from(0), default=1)
    parser.add_argument("--stage1-steps", type=whole_from(1), default=700)
    parser.add_argument("--stage2-steps", type=whole_from(1), default=3800)
    parser.add_argument("--batch", type=whole_from(1), default=8, help="images per process and step")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the layers (needs a C++ compiler)"
    )
    options = parser.parse_args()
    from .training import train  # here: it needs torch, and --help does not

    train(options)


if __name__ == "__main__":
    main()
