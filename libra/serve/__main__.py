"""python -m libra.serve"""

from .command import main

main()
