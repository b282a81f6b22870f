"""Train the next embedded model from nothing: ``torchrun --nproc_per_node 2 -m mini.next.train --output DIR``."""

from pathlib import Path

from libra.cli import Parser


def main() -> None:
    parser = Parser(prog="python -m mini.next.train", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the finished checkpoint and of its working files")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--stage1-steps", type=int, default=2500, help="of 32 images (default %(default)s)")
    parser.add_argument("--stage2-steps", type=int, default=3400, help="of 16 images (default %(default)s)")
    parser.add_argument("--validation", type=int, default=192, help="images that progress is measured on (default %(default)s)")
    parser.add_argument("--validate-every", type=int, default=200, help="steps (default %(default)s)")
    parser.add_argument("--save-every", type=int, default=100, help="steps (default %(default)s)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the layers (needs a C++ compiler)")
    options = parser.parse_args()
    from .training import train  # here: it needs torch, and --help does not

    train(options)


if __name__ == "__main__":
    main()
