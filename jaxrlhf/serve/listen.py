"""From a model's name to a server that listens, and how it ends."""

import contextlib
import ipaddress
import os
import signal
import socket
import sys
import time
from types import FrameType
from typing import NamedTuple

import uvicorn  # pyright: ignore[reportMissingImports]

from jaxrlhf.errors import ConfigError, counted
from jaxrlhf.serve.engine import Engine
from jaxrlhf.serve.server import Limits, Server
from jaxrlhf.serve.service import TextService, read_scores, read_service
from jaxrlhf.types import Role

TOKEN = "JAXRLHF_SERVE_TOKEN"
BACKLOG = 2048  # connections that wait to be accepted
KEEP_ALIVE = 5  # seconds that an idle connection stays open


def check_address(host: str) -> None:
    """Raises ConfigError for an address that others can reach, where no token keeps them out."""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback and not os.environ.get(TOKEN):
        raise ConfigError(
            f"--host {host}: others can reach it; expected {TOKEN} in the environment; nearest: 127.0.0.1"
        )


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens there, before the model is read: a port in use is heard of at once, and clients that come
    early wait."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
        found.listen(BACKLOG)
    except OSError as error:
        found.close()
        raise ConfigError(f"--port {port}: {host}: {error.strerror}; expected a free one, or 0") from None
    return found


class Asked(NamedTuple):
    """What is to be served, and how much of it at once."""

    model: str
    slots: int
    context: int
    waiting: int
    name: str = ""


def serve_model(asked: Asked, role: Role, host: str, port: int, limits: Limits) -> None:
    """Serve a policy, or the scores of a reward model, until SIGTERM or Ctrl-C: then no more connections are taken, and
    what is being answered is finished within ``limits.seconds``. Raises ValueError, in one line, where it can't be."""
    with listening(host, port) as where, contextlib.ExitStack() as stack:
        given = (asked.model, asked.slots, asked.context, asked.waiting, asked.name)
        service = read_service(*given) if role == "policy" else read_scores(*given)
        began = time.monotonic()
        print(f"{service.name}: compiling its programs, which are kept for the next start", file=sys.stderr, flush=True)
        if isinstance(service, TextService):
            service.engine.slots.warm_up()
            stack.enter_context(service.engine)
        else:
            service.warm_up()
        print(f"{service.name}: programs ready in {time.monotonic() - began:.0f} s", file=sys.stderr)
        server = Server(service, os.environ.get(TOKEN) or None, limits)
        address = f"http://{f'[{host}]' if ':' in host else host}:{where.getsockname()[1]}"
        print(f"{address}/v1  (model {service.name!r}; Ctrl-C ends it)", flush=True)
        run(server, where, limits)


class Announced(uvicorn.Server):
    """uvicorn, which says at the first signal what it waits for."""

    def __init__(self, config: uvicorn.Config, engine: Engine | None):
        super().__init__(config)
        self.engine = engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        left = 0 if self.engine is None else self.engine.running + len(self.engine.queue)
        if left and not self.should_exit:
            # not print: the signal may have come amid one
            os.write(2, f"\n{counted(left, 'response')} to be finished; Ctrl-C stops at once\n".encode())
        super().handle_exit(sig, frame)


def run(server: Server, where: socket.socket, limits: Limits) -> None:
    """uvicorn, until a signal ends it."""
    config = uvicorn.Config(
        server.app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=int(limits.seconds),
    )
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again once all is finished: that is a success
    Announced(config, server.engine).run(sockets=[where])
