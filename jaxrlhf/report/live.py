"""`jaxrlhf report --serve`: the page over HTTP, whose numbers follow runs in progress."""

import json
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from jaxrlhf.errors import ConfigError
from jaxrlhf.report.content import content_of, packed
from jaxrlhf.report.page import library, page_of
from jaxrlhf.report.runs import read_runs

FRESH = 2.0  # seconds for which an answer serves all who ask


class LiveContent:
    """The content of the runs, read again when it is older than FRESH."""

    def __init__(self, paths: Sequence[str]):
        self.paths, self.lock = paths, threading.Lock()
        self.content, self.read = content_of(read_runs(paths)), time.monotonic()

    def newest(self) -> dict:
        with self.lock:
            if time.monotonic() - self.read > FRESH:
                self.content, self.read = content_of(read_runs(self.paths)), time.monotonic()
            return self.content | {"live": True}


def make_server(paths: Sequence[str], host: str, port: int) -> ThreadingHTTPServer:
    """A server of the page at / and of its numbers at /content.json; of nothing else. ``port`` 0: a free one.

    Raises ConfigError, in one line, where nothing can listen there."""
    source = LiveContent(paths)
    library()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            place = self.path.partition("?")[0]
            try:
                if place == "/":
                    self.answer(200, "text/html", page_of(source.newest()))
                elif place == "/content.json":
                    text = json.dumps(packed(source.newest()), ensure_ascii=False, allow_nan=False)
                    self.answer(200, "application/json", text)
                else:
                    self.answer(404, "text/plain", "not here; expected / or /content.json\n")
            except (OSError, ValueError) as error:  # the run directory went away, or is being written anew
                self.answer(503, "text/plain", f"{error}\n")

        def answer(self, status: int, kind: str, text: str) -> None:
            data = text.encode("utf-8", errors="replace")
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """Requests are not printed."""

    try:
        return ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise ConfigError(f"--port {port}: {host}: {error.strerror}; expected a free port, or 0 for any") from None
