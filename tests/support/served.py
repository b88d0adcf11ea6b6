"""Tests of what is served: a server in a thread, the example's request, and what `jaxrlhf generate` writes."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jax
import openai  # pyright: ignore[reportMissingImports]
import pytest
import uvicorn  # pyright: ignore[reportMissingImports]

from jaxrlhf.generate.config import GenerateConfig
from jaxrlhf.serve import writer
from jaxrlhf.serve.server import Server
from jaxrlhf.serve.writer import Response, Writer
from jaxrlhf.sharding import make_mesh

PROMPT = "The cat sat on the mat."


@cache
def kept_writer(folder: Path, cfg: GenerateConfig, seed: int, samples: int) -> Writer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:1]))
        return Writer(str(folder), cfg, seed, samples, width=256)


def generated(folder: Path, prompt: str, cfg: GenerateConfig, seed: int = 0, samples: int = 1) -> list[Response]:
    """The responses to a prompt, on one device."""
    (responses,) = kept_writer(folder, cfg, seed, samples)([{"prompt": prompt}])
    return responses


@contextlib.contextmanager
def listening(server: Server) -> Iterator[str]:
    """The address of a server in a thread of its own."""
    with socket.socket() as where:
        where.bind(("127.0.0.1", 0))
        where.listen(128)
        running = uvicorn.Server(uvicorn.Config(server.app, log_level="warning"))
        thread = threading.Thread(target=lambda: running.run(sockets=[where]))
        thread.start()
        try:
            yield f"http://127.0.0.1:{where.getsockname()[1]}/v1"
        finally:
            running.should_exit = True
            thread.join()


def complete(client: openai.OpenAI, **asked: Any) -> Any:
    return client.completions.create(**({"model": "tiny", "prompt": PROMPT, "max_tokens": 8, "seed": 3} | asked))
