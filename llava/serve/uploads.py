"""The page's uploads: where they lie, how long they stay, and that nothing else is read."""

import json
import os
import threading
import time
from pathlib import Path

from libra.utils.server import given_again, refusal, whole_body

KEPT_SECONDS = 600.0  # after its last use
KEPT_BYTES = 256 * 2**20  # of all together
_API = "/gradio_api"
# What the page in the browser asks of Gradio. The rest of Gradio's routes (proxies, recordings, code, run
# history …) is closed.
_OPEN = {
    "/",
    "/config",
    "/theme.css",
    "/favicon.ico",
    "/manifest.json",
    "/robots.txt",
    *(
        f"{_API}/{name}"
        for name in (
            "info",
            "app_id",
            "startup-events",
            "theme.css",
            "upload",
            "upload_progress",
            "queue/join",
            "queue/data",
            "cancel",
            "reset",
            "run/predict",
        )
    ),
}
_OPEN_BELOW = ("/assets/", "/static/", "/svelte/", f"{_API}/heartbeat/")
_FILE, _UPLOAD = f"{_API}/file=", f"{_API}/upload"


class Uploads:
    """A folder of uploads."""

    def __init__(self, folder: Path, seconds: float = KEPT_SECONDS, size: int = KEPT_BYTES):
        self.folder, self.seconds, self.size = Path(os.path.realpath(folder)), seconds, size
        self._always: set[Path] = set()

    def _files(self) -> list[Path]:
        return [Path(place, name) for place, _, names in os.walk(self.folder) for name in names]

    def keep(self) -> None:
        """What is there now, the examples, stays as long as the folder."""
        self._always.update(self._files())

    def find(self, path: str) -> Path | None:
        """The upload of that path; None for everything else."""
        try:
            real = Path(os.path.realpath(path))
            return real if real.is_file() and real.is_relative_to(self.folder) else None
        except (OSError, ValueError):  # a path that no file can have
            return None

    def read(self, path: str) -> bytes:
        """An upload's bytes; it counts as used now. Raises ValueError where it is none, or no longer
        there."""
        found = self.find(path)
        try:
            os.utime(found or "")
            return found.read_bytes()
        except OSError:
            minutes = f"{self.seconds / 60:.0f}"
            raise ValueError(
                f"the image is gone, {minutes} minutes after its last use; upload it again"
            ) from None

    def sweep(self) -> None:
        """Remove what was not used for ``seconds``, and the oldest where all together are larger than
        ``size``."""
        ages = []
        for path in self._files():
            try:
                facts = path.stat()
            except OSError:  # removed in the meantime
                continue
            if path not in self._always:
                ages.append((facts.st_mtime, facts.st_size, path))
        room, now = self.size, time.time()
        for used, size, path in sorted(ages, reverse=True):
            room -= size
            if room < 0 or now - used > self.seconds:
                path.unlink(missing_ok=True)
                try:
                    path.parent.rmdir()
                except OSError:  # something else is in it
                    pass

    def remove_unfinished(self) -> None:
        """Remove what Gradio was still writing when an upload broke off; whole ones lie in folders of their
        own."""
        for path in self.folder.iterdir():
            if path.is_file() and path not in self._always:
                path.unlink(missing_ok=True)

    def sweep_every(self, seconds: float) -> None:
        """Sweep in the background until the process ends."""

        def work():
            while True:
                time.sleep(seconds)
                self.sweep()

        threading.Thread(target=work, daemon=True, name="uploads").start()


class UploadsOnly:
    """In front of Gradio: closes the routes that the page does not need, and every way to a file that was not
    uploaded.

    Gradio reads whatever file or address an argument names as ``{"path": …}``, for any of a page's fields,
    and copies it to where its file route serves it. So paths are looked for everywhere in a request.
    """

    def __init__(self, app, uploads: Uploads):
        self.app, self.uploads, self._uploading = app, uploads, 0

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http":
            refused, receive = await self._look(scope, receive)
            if refused is not None:
                return await refused(scope, receive, send)
        elif scope["type"] != "lifespan":
            return
        if scope.get("path") == _UPLOAD:
            await self._upload(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _upload(self, scope, receive, send):
        self.uploads.sweep()
        self._uploading += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self._uploading -= 1
            if not self._uploading:
                self.uploads.remove_unfinished()

    async def _look(self, scope, receive):
        path = scope["path"]
        if path.startswith(_FILE):
            is_open = self.uploads.find(path.removeprefix(_FILE)) is not None
        else:
            is_open = path in _OPEN or path.startswith(_OPEN_BELOW)
        if not is_open:
            return refusal(404, "there is nothing here"), receive
        if scope["method"] != "POST" or path == _UPLOAD:
            return None, receive
        body = await whole_body(receive)
        if body is None:
            return refusal(400, "the request broke off"), receive
        if not self._is_harmless(body):
            return refusal(403, "only images that were uploaded here are read"), receive
        return None, given_again(body, receive)

    def _is_harmless(self, body: bytes) -> bool:
        """Whether every path in a request's JSON is an upload's."""
        try:
            values = [json.loads(body or b"null")]
        except (ValueError, RecursionError):
            return False
        while values:
            value = values.pop()
            if isinstance(value, dict):
                if isinstance(value.get("path"), str) and self.uploads.find(value["path"]) is None:
                    return False
                value = list(value.values())
            if isinstance(value, list):
                values += value
        return True
