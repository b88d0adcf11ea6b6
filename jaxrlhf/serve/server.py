"""The HTTP server: OpenAI's paths over a service, with its limits."""

import asyncio
import contextlib
import dataclasses
import hmac
import json
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette  # pyright: ignore[reportMissingImports]
from starlette.exceptions import HTTPException  # pyright: ignore[reportMissingImports]
from starlette.requests import ClientDisconnect, Request  # pyright: ignore[reportMissingImports]
from starlette.responses import JSONResponse, Response, StreamingResponse  # pyright: ignore[reportMissingImports]
from starlette.routing import Route  # pyright: ignore[reportMissingImports]

from jaxrlhf.serve.jobs import Job
from jaxrlhf.serve.openai_replies import ChatReply, CompletionReply, Reply
from jaxrlhf.serve.openai_requests import ApiError, Chat, Completion, Scores, parse
from jaxrlhf.serve.server_metrics import ServerMetrics
from jaxrlhf.serve.service import ScoreService, Service, TextService

RETRY_AFTER = "1"  # seconds


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a client may ask for."""

    body: int = 2**20  # bytes
    seconds: float = 600.0  # of a request, from its first byte to its last
    body_seconds: float = 30.0  # until all of a body has come


class Server:
    """The application. ``token``: what clients have to bring, as a bearer token."""

    def __init__(self, service: Service, token: str | None = None, limits: Limits = Limits()):
        self.service, self.token, self.limits, self.created = service, token, limits, int(time.time())
        self.engine = service.engine if isinstance(service, TextService) else None
        self.metrics = ServerMetrics(self.engine)
        routes = [
            Route("/health", self.health),
            Route("/metrics", self.guarded(self.show_metrics)),
            Route("/v1/models", self.guarded(self.models)),
            Route("/v1/models/{name}", self.guarded(self.model)),
        ]
        paths: dict[str, Callable[[Request], Awaitable[Response]]] = {"/v1/scores": self.scores}
        if isinstance(service, TextService):
            paths = {"/v1/completions": self.completions, "/v1/chat/completions": self.chat}
        routes += [Route(path, self.guarded(handle), methods=["POST"]) for path, handle in paths.items()]
        self.app = Starlette(routes=routes, exception_handlers={HTTPException: self.unknown})

    def guarded(self, handle: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """``handle`` for clients that bring the token; its errors as JSON, of which unexpected ones say nothing."""

        async def answer(request: Request) -> Response:
            began = time.perf_counter()
            response = await self.reply(request, handle)
            path = request.scope["route"].path
            self.metrics.note(path, response.status_code, time.perf_counter() - began)
            return response

        return answer

    async def reply(self, request: Request, handle: Callable[[Request], Awaitable[Response]]) -> Response:
        try:
            self.authorize(request)
            return await handle(request)
        except ApiError as error:
            return refusal(error)
        except ClientDisconnect:
            return Response(status_code=499)  # that nobody reads
        except Exception:
            traceback.print_exc()
            return refusal(ApiError(500, "The server had an error; its log says more"))

    def authorize(self, request: Request) -> None:
        if self.token is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.token.encode()):
            raise ApiError(401, "Incorrect API key provided", None, "invalid_api_key")

    async def unknown(self, request: Request, error: Any) -> Response:
        status = error.status_code
        what = "No such path" if status == 404 else "Not allowed"
        return refusal(ApiError(status, f"{what}: {request.method} {request.url.path}"))

    # ---- paths ------------------------------------------------------------------------------------------------------

    async def health(self, request: Request) -> Response:
        alive = self.engine is None or self.engine.thread.is_alive()
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    async def show_metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self.about()]})

    async def model(self, request: Request) -> Response:
        self.service.check_name(request.path_params["name"])
        return JSONResponse(self.about())

    def about(self) -> dict[str, Any]:
        return {"id": self.service.name, "object": "model", "created": self.created, "owned_by": "jaxrlhf"}

    async def scores(self, request: Request) -> Response:
        assert isinstance(self.service, ScoreService)
        asked = parse(Scores, await self.read_json(request))
        self.service.check_name(asked.model)
        try:
            async with asyncio.timeout(self.limits.seconds):
                return JSONResponse(await self.service.score(asked))
        except TimeoutError:
            raise ApiError(504, f"No response within {self.limits.seconds:g} s", None, "timeout") from None

    async def completions(self, request: Request) -> Response:
        return await self.write(request, Completion, CompletionReply)

    async def chat(self, request: Request) -> Response:
        return await self.write(request, Chat, ChatReply)

    async def write(self, request: Request, kind: type, reply_kind: type[Reply]) -> Response:
        """The response to a request for text."""
        assert isinstance(self.service, TextService)
        asked = parse(kind, await self.read_json(request))
        self.service.check_name(asked.model)
        changed, loop = asyncio.Event(), asyncio.get_running_loop()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(changed.set)

        jobs = self.service.chat(asked, tell) if kind is Chat else self.service.completion(asked, tell)
        reply = reply_kind(asked, self.service.model.tokenizer, jobs)
        if asked.stream:
            events = self.stream(reply, jobs, changed)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        return await self.whole(request, reply, jobs, changed)

    async def whole(self, request: Request, reply: Reply, jobs: list[Job], changed: asyncio.Event) -> Response:
        """The reply once all jobs have ended; a client that goes away frees their slots."""
        gone = asyncio.create_task(gone_away(request))
        gone.add_done_callback(lambda _: changed.set())
        try:
            async with asyncio.timeout(self.limits.seconds):
                while any(job.reason is None for job in jobs):
                    await changed.wait()
                    changed.clear()
                    if gone.done():
                        raise ClientDisconnect
        except TimeoutError:
            raise ApiError(504, f"No response within {self.limits.seconds:g} s", None, "timeout") from None
        finally:
            gone.cancel()
            self.cancel(jobs)
        check(jobs)
        return JSONResponse(reply.whole())

    async def stream(self, reply: Reply, jobs: list[Job], changed: asyncio.Event) -> AsyncIterator[str]:
        """Server-sent events. What goes wrong once they began is an event, too."""
        try:
            async with asyncio.timeout(self.limits.seconds):
                while len(reply.finished) < len(jobs):
                    await changed.wait()
                    changed.clear()
                    check(jobs)
                    for event in reply.news():
                        yield event
            for event in reply.last():
                yield event
        except TimeoutError:
            yield failure(ApiError(504, f"No response within {self.limits.seconds:g} s", None, "timeout"))
        except ApiError as error:
            yield failure(error)
        finally:
            self.cancel(jobs)

    def cancel(self, jobs: list[Job]) -> None:
        if self.engine is not None:
            self.engine.cancel(jobs)

    async def read_json(self, request: Request) -> Any:
        """The body. Raises ApiError where it is too large, too slow or no JSON."""
        too_large = ApiError(413, f"The body has more than {self.limits.body} bytes", None, "request_too_large")
        length = request.headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.limits.body:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                async for part in request.stream():
                    body += part
                    if len(body) > self.limits.body:
                        raise too_large
        except TimeoutError:
            raise ApiError(408, f"The body took more than {self.limits.body_seconds:g} s") from None
        try:
            return json.loads(bytes(body))
        except (ValueError, RecursionError):
            raise ApiError(400, "We could not parse the JSON body of your request") from None


def check(jobs: list[Job]) -> None:
    """Raises ApiError where the engine could not finish one."""
    if any(job.reason in ("error", "cancelled") for job in jobs):
        raise ApiError(500, "The server could not finish the response")


def refusal(error: ApiError) -> Response:
    headers = {"Retry-After": RETRY_AFTER} if error.status == 429 else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body, error.status, headers)


def failure(error: ApiError) -> str:
    return f"data: {json.dumps(error.body)}\n\n"


async def gone_away(request: Request) -> None:
    """Returns once the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
