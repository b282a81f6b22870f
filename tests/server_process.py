"""A server of this project in a process of its own, for the clients of the tests."""

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).parents[1]
STARTS_WITHIN = 540  # seconds


class ServerProcess:
    """``with ServerProcess(folder, module, line, options) as server``; its log and what it keeps lie in the
    folder.

    Args:
        module: the command, which takes ``--port`` and ``--device``.
        line: a pattern of the first line that it prints, with groups for its address and its port.
    """

    def __init__(self, folder: Path, module: str, line: str, options: tuple[str, ...]):
        self.folder, self.line = folder, line
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", module, "--port", "0", "--device", "cpu", *options]
        self._log = open(folder / "log.txt", "w")
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=self._log, text=True
        )

    def __enter__(self):
        watchdog = threading.Timer(STARTS_WITHIN, self.process.kill)
        watchdog.daemon = True
        watchdog.start()
        line = self.process.stdout.readline()
        watchdog.cancel()
        found = re.search(self.line, line)
        assert found, line + self.log()
        self.url, self.port = found[1], int(found[2])
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()
        self._log.close()

    def log(self) -> str:
        return (self.folder / "log.txt").read_text()
