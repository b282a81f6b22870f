"""python -m libra.latency"""

from .command import main

raise SystemExit(main())
