"""python -m libra.vllm"""

from .command import main

main()
