"""Tables: a resumable runner and the report; the lmms-eval model and the task files are in libra/lmms."""

from libra.utils.cli import only_commands

only_commands("eval", "data", "plots", "report", "run", "throughput")
