"""python -m libra.figures"""

from .command import main

raise SystemExit(main())
