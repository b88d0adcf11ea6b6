"""The event loop of all async functions that score, or judge."""

import asyncio
import functools
import inspect
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any


@functools.cache
def event_loop() -> asyncio.AbstractEventLoop:
    """The loop, in a thread of its own, of all async functions: what they keep open between calls belongs to it. A
    notebook's thread has a loop that is running already."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="async rewards", daemon=True).start()
    return loop


def begin(answer: Awaitable[Any]) -> Future:
    """What an async function will return; cancel it, and the function is."""

    async def finished() -> Any:
        return await answer

    return asyncio.run_coroutine_threadsafe(finished(), event_loop())


def wait_for(answer: Awaitable[Any]) -> Any:
    """What an async function returns."""
    return begin(answer).result()


def is_async(function: Callable) -> bool:
    """Whether a call of ``function`` is sure to return at once, with something to wait for."""
    while isinstance(function, functools.partial):
        function = function.func
    if hasattr(function, "is_async"):
        return bool(function.is_async)  # pyright: ignore[reportFunctionMemberAccess]
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004
