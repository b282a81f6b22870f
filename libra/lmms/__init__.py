"""The lmms-eval model ``libra``, its engines and its task files; lmms-eval finds it by the entry point in
setup.py."""

from pathlib import Path

TASKS = Path(__file__).resolve().parent / "tasks"
