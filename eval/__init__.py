"""Tables: a resumable runner and the report; the lmms-eval model and the task files are in libra/lmms."""

from libra.cli import only_commands

only_commands("eval", "data", "report", "run", "throughput")
