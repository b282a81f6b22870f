"""Train the embedded model from nothing: ``torchrun --nproc_per_node 2 -m mini.train --output
DIR``."""

from pathlib import Path

from libra.utils.cli import Parser, whole_from


def main() -> None:
    parser = Parser(prog="python -m mini.train", description=__doc__)
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="folder of the finished checkpoint and of its working files",
    )
    parser.add_argument(
        "--seed", type=whole_from(0), default=0, help="default %(default)s, the shipped model's"
    )
    parser.add_argument(
        "--stage1-steps", type=whole_from(1), default=2500, help="of 32 images (default %(default)s)"
    )
    parser.add_argument(
        "--stage2-steps", type=whole_from(1), default=2700, help="of 16 images (default %(default)s)"
    )
    parser.add_argument(
        "--validation", type=whole_from(1), default=192, help="images of the curve (default %(default)s)"
    )
    parser.add_argument(
        "--validate-every", type=whole_from(1), default=200, help="steps (default %(default)s)"
    )
    parser.add_argument("--save-every", type=whole_from(1), default=100, help="steps (default %(default)s)")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the layers (needs a C++ compiler)"
    )
    options = parser.parse_args()
    from .training import train  # here: it needs torch, and --help does not

    train(options)


if __name__ == "__main__":
    main()
