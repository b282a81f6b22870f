"""A web server in a thread of the test, with the bodies, redirects and bad manners that a test gives it."""

import threading
from collections.abc import Callable
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class WebServer(ThreadingHTTPServer):
    """``bodies``: path → bytes, or a function that writes its answer itself on the request's handler."""

    daemon_threads = True
    bodies: dict[str, bytes | Callable[[BaseHTTPRequestHandler], None]]

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        body = self.server.bodies.get(self.path)
        with suppress(OSError):  # the other side has gone
            if body is None:
                self.send_error(404)
            elif callable(body):
                body(self)
            else:
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def serving():
    with WebServer(("127.0.0.1", 0), _Handler) as server:
        server.bodies = {}
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
