"""A client of servers that judge or grade: many requests at once, each with a time limit and bounded retries.

The library `openai` (extra "judge") sends them: it tries again after 408, 409, 429, 5xx and lost connections, with
exponential backoff and jitter, and waits as long as Retry-After says."""

import asyncio
import collections
import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import pydantic

from jaxrlhf.errors import counted, cut, nearest, need_extra, one_line, show

if TYPE_CHECKING:
    import openai  # pyright: ignore[reportMissingImports]

KEY = "JAXRLHF_JUDGE_KEY"
NO_KEY = "none"  # what a server that asks for no key is sent
LARGEST = 2**24  # bytes of a reply that are read; what is cut there is no JSON
FATAL = {401: "expected a key in {key}", 403: "expected a key in {key}", 404: "expected a URL and a model that exist"}
T = TypeVar("T")
Read = Callable[[dict[str, Any], Mapping[str, Any]], T]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RemoteConfig:
    """A server, and how it is asked."""

    url: str  # what the path of a request is put behind, as in https://api.openai.com/v1
    key_variable: str = KEY  # the environment variable that holds the key; no key where it is not set
    concurrency: int = 16  # requests under way at once
    timeout: float = 60.0  # seconds of one try, to the last byte of its reply
    retries: int = 4  # tries after the first
    deadline: float = 600.0  # seconds for all requests of one call, their retries included

    def __post_init__(self) -> None:
        check_url(self.url)
        for name, least in (("concurrency", 1), ("timeout", 1e-3), ("retries", 0), ("deadline", 1e-3)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}: {getattr(self, name)}: expected at least {least}")


def check_url(url: str) -> None:
    """Raises ValueError, in one line, for what is no http address, or for one with a password in it."""
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        known = False
        parts = urlsplit("")
    if not known:
        raise ValueError(f"url: {show(url)}: expected an address, as in https://api.openai.com/v1")
    if parts.username or parts.password:
        raise ValueError(f"url: a key for {parts.hostname} is in it; expected the key in an environment variable")


def settings_of(kind: type[T], given: Mapping[str, Any]) -> T:
    """The dataclass ``kind`` made of ``given``. Raises ValueError, in one line: the key, what is wrong with its value,
    or the nearest key."""
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in given:
        if name not in names:
            raise ValueError(f"{name}: unknown key; {nearest(name, names)}")
    try:
        return pydantic.TypeAdapter(kind).validate_python(dict(given))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        if first["type"] == "value_error":  # of __post_init__, which names the key
            raise ValueError(str(first.get("ctx", {}).get("error", first["msg"]))) from None
        said = "expected a value" if first["type"] == "missing" else f"{show(first['input'])}: {first['msg']}"
        raise ValueError(f"{where}: {said}") from None


class Failed(NamedTuple):
    """A request that got no reply that can be used."""

    why: str


@dataclasses.dataclass
class Usage:
    """What the requests cost so far."""

    requests: int = 0  # tries
    prompt_tokens: int = 0  # as the server counts them
    completion_tokens: int = 0

    def add(self, reply: Mapping[str, Any]) -> None:
        """The tokens that a reply says it took."""
        used = reply.get("usage")
        for name in ("prompt_tokens", "completion_tokens"):
            count = used.get(name) if isinstance(used, Mapping) else None
            if isinstance(count, int):
                setattr(self, name, getattr(self, name) + count)


class Client:
    """Requests to one server. All of its calls belong to one event loop.

    Raises ConfigError where the library is not installed."""

    def __init__(self, cfg: RemoteConfig):
        need_extra("a remote judge or grader", "judge", "openai")
        self.cfg, self.usage = cfg, Usage()

    @functools.cached_property
    def connection(self) -> "openai.AsyncOpenAI":
        """The library's client. What OPENAI_... variables hold goes to no server that they were not meant for."""
        import openai  # pyright: ignore[reportMissingImports]

        made = openai.AsyncOpenAI(
            base_url=self.cfg.url,
            api_key=os.environ.get(self.cfg.key_variable) or NO_KEY,
            admin_api_key="",
            max_retries=self.cfg.retries,
            timeout=self.cfg.timeout,
            http_client=limited_client(self.cfg.timeout, self.usage),
        )
        made.organization = made.project = None
        return made

    async def post_all(self, path: str, bodies: Sequence[Mapping[str, Any]], read: Read[T]) -> list[T | Failed]:
        """What ``read`` makes of the JSON object that answers each body, and of the body; or why there is nothing:
        ``read`` may raise ValueError.

        Raises ValueError, in one line, where the server refuses the key, the model or the path, or where no request at
        all is answered: the server is down, or another one than expected."""
        if not bodies:
            return []
        free = asyncio.Semaphore(self.cfg.concurrency)
        tasks = [asyncio.create_task(self.post(free, path, body, read)) for body in bodies]
        try:
            await asyncio.wait(tasks, timeout=self.cfg.deadline, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        late = Failed(f"no reply within {self.cfg.deadline:g} s, the deadline of all requests")
        for task in tasks:
            if not task.cancelled() and (error := task.exception()):
                raise error
        replies = [late if task.cancelled() else task.result() for task in tasks]
        failed = [reply.why for reply in replies if isinstance(reply, Failed)]
        if len(failed) == len(replies):
            ((most, _),) = collections.Counter(failed).most_common(1)
            raise ValueError(f"{self.cfg.url}: none of {counted(len(failed), 'request')} was answered: {most}")
        return replies

    async def post(self, free: asyncio.Semaphore, path: str, body: Mapping[str, Any], read: Read[T]) -> T | Failed:
        """The reply to one body. Raises ValueError for what is wrong with all requests."""
        import httpx2  # pyright: ignore[reportMissingImports]
        import openai  # pyright: ignore[reportMissingImports]

        async with free:
            try:
                response = await self.connection.post(path, cast_to=httpx2.Response, body=dict(body))
                found = response.json()
            except openai.APIStatusError as error:
                said = one_line(error.message)[:200]  # which begins with "Error code: "
                if (expected := FATAL.get(error.status_code)) is None:
                    return Failed(said)
                raise ValueError(f"{self.cfg.url}: {said}; {expected.format(key=self.cfg.key_variable)}") from None
            except openai.APITimeoutError:
                return Failed(f"no reply within {self.cfg.timeout:g} s, in {self.cfg.retries + 1} tries")
            except openai.APIConnectionError as error:
                return Failed(f"no connection: {cut(one_line(error.__cause__ or error))}")
            except (ValueError, RecursionError):  # of response.json(): no JSON, no UTF-8
                return Failed("a reply that is no JSON")
        if not isinstance(found, dict):
            return Failed(f"a reply that is no JSON object: {show(found)}")
        self.usage.add(found)
        try:
            return read(found, body)
        except ValueError as error:
            return Failed(one_line(error))


def limited_client(seconds: float, usage: Usage) -> Any:
    """The HTTP client of the library, in which a try, to the last byte of its reply, takes ``seconds`` at most. The
    library's own limit begins again with each byte."""
    import httpx2  # pyright: ignore[reportMissingImports]
    import openai  # pyright: ignore[reportMissingImports]

    class Limited(openai.DefaultAsyncHttpxClient):
        async def send(self, request: Any, **options: Any) -> Any:
            usage.requests += 1
            try:
                async with asyncio.timeout(seconds):
                    response = await super().send(request, **{**options, "stream": True})
                    return await whole(response)
            except TimeoutError:
                raise httpx2.ReadTimeout(f"no reply within {seconds:g} s", request=request) from None

    async def whole(response: Any) -> Any:
        """The response with its body, of at most LARGEST bytes."""
        body = bytearray()
        try:
            async for part in response.aiter_bytes():
                body += part
                if len(body) > LARGEST:
                    break
        finally:
            await response.aclose()
        headers = [(name, value) for name, value in response.headers.multi_items() if name not in ENCODING]
        return httpx2.Response(
            response.status_code, headers=headers, content=bytes(body[:LARGEST]), request=response.request
        )

    return Limited(follow_redirects=False)


ENCODING = ("content-encoding", "content-length", "transfer-encoding")  # of the body as it was sent
