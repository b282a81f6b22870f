"""Print where the tower's [CLS] token looks: ``python -m mini.look mini/checkpoint/vision_tower``."""

import json
from pathlib import Path

from libra.utils.cli import Parser


def main() -> None:
    parser = Parser(prog="python -m mini.look", description=__doc__)
    parser.add_argument("tower", type=Path, help="folder of a CLIP vision tower")
    tower = parser.parse_args().tower
    from .attention import measure  # here: it needs torch, and --help does not

    print(json.dumps(measure(tower), indent=1))


if __name__ == "__main__":
    main()
