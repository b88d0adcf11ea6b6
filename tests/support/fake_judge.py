"""A server that speaks OpenAI's chat path, with what it says and what goes wrong chosen by the test."""

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any

TEXTS = re.compile(r"<(prompt|first|second|response)>\n(.*?)\n</\1>", re.DOTALL)


def texts_of(body: dict[str, Any]) -> dict[str, str]:
    """The texts in our standard prompts: "prompt", "first" and "second", or "response"."""
    return dict(TEXTS.findall(body["messages"][0]["content"]))


def chat(text: Any, **more: Any) -> dict[str, Any]:
    """The body of a reply that says ``text``."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}, **more}
    return {"object": "chat.completion", "choices": [choice], "usage": {"prompt_tokens": 10, "completion_tokens": 3}}


class Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # of 5 some connections would be refused, and tried again


class FakeJudge:
    """While it is entered, a server at ``url``.

    ``says``: from a request's body to a reply's text, or to its whole body.
    ``faults``: what happens to the first requests, one each, and then no more: a status, "hang", "close", "garbage",
    "drip" (a byte at a time, for ever), "huge", or None; a pair of a status and its headers. ``always``: to all."""

    def __init__(self, says: Callable[[dict[str, Any]], Any], faults: Any = (), always: Any = None):
        self.says, self.faults, self.always = says, list(faults), always
        self.bodies: list[dict[str, Any]] = []
        self.heads: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.times: list[float] = []
        self.under_way = self.most = 0  # requests at once
        self.lock, self.over = threading.Lock(), threading.Event()

    def __enter__(self) -> "FakeJudge":
        judge = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with judge.lock:
                    judge.bodies.append(body)
                    judge.heads.append({name.lower(): value for name, value in self.headers.items()})
                    judge.paths.append(self.path)
                    judge.times.append(time.monotonic())
                    fault = judge.faults.pop(0) if judge.faults else judge.always
                    judge.under_way += 1
                    judge.most = max(judge.most, judge.under_way)
                try:
                    with contextlib.suppress(OSError):  # the client went away
                        judge.answer(self, body, fault)
                finally:
                    with judge.lock:
                        judge.under_way -= 1

            def log_message(self, format: str, *args: object) -> None:
                """Nothing is printed."""

        self.server = Listener(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.server.shutdown()
        self.server.server_close()

    def answer(self, handler: Any, body: dict[str, Any], fault: Any) -> None:
        if fault == "hang":
            self.over.wait()
        elif fault == "close":
            handler.close_connection = True
        elif fault == "garbage":
            send(handler, 200, b"<html>\xff no JSON")
        elif fault == "huge":
            send(handler, 200, b'"' + b"x" * 2**20)
        elif fault == "drip":
            handler.send_response(200)
            handler.send_header("Content-Length", "1000000")
            handler.end_headers()
            while not self.over.wait(0.02):
                handler.wfile.write(b" ")
                handler.wfile.flush()
        elif fault is not None:
            status, headers = fault if isinstance(fault, tuple) else (fault, {})
            send(handler, status, json.dumps({"error": {"message": f"fault {status}"}}).encode(), headers)
        else:
            said = self.says(body)
            send(handler, 200, json.dumps(said if isinstance(said, dict) else chat(said)).encode())


def send(handler: Any, status: int, data: bytes, headers: Mapping[str, str] = MappingProxyType({})) -> None:
    handler.send_response(status)
    for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(data)
