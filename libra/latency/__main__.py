"""python -m libra.latency"""

from .arguments import main

raise SystemExit(main())
