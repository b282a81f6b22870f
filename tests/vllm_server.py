"""A vLLM server in a process group of its own, started by scripts/serve_vllm.sh."""

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[1]
STARTS_WITHIN = 1200  # seconds, next to other work
# Small, in float32, and with a request's own ratio.
OPTIONS = (
    "--dtype", "float32", "--max-model-len", "1024", "--enforce-eager", "--max-num-seqs", "8",
    "--trust-request-mm-kwargs",
)  # fmt: skip


def command(model: Path, *options: str) -> tuple[list[str], dict[str, str]]:
    """What starts one, and its environment."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return ["bash", str(ROOT / "scripts/serve_vllm.sh"), str(model), *options], environment


class VllmServer:
    """``with VllmServer(folder, model, row) as server``; its log lies in the folder. The port stays its own,
    so that one that was killed can be started again."""

    def __init__(self, folder: Path, model: Path, row: str):
        self.folder, self.model, self.row = folder, model, row
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Without waiting until it answers."""
        own = ("--host", "127.0.0.1", "--port", str(self.port))
        words, environment = command(self.model, self.row, *OPTIONS, *own)
        with open(self.folder / f"{self.port}.log", "a") as log:
            self.process = subprocess.Popen(
                words, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self) -> None:
        end = time.monotonic() + STARTS_WITHIN
        while True:
            assert self.process.poll() is None and time.monotonic() < end, self.log()
            try:
                if httpx.get(f"{self.url}/health", timeout=10).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.5)

    def __enter__(self):
        self.start()
        self.wait()
        return self

    def __exit__(self, *_):
        self.kill()

    def kill(self) -> None:
        """Every process of it, with -9."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()

    def log(self) -> str:
        return (self.folder / f"{self.port}.log").read_text()[-6000:]
