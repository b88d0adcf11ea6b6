"""What a client asks for, as OpenAI's API words it, checked; and what is wrong with it."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jaxrlhf.serve.slots import TOP


class ApiError(Exception):
    """A request that is refused: ``body`` is the JSON that OpenAI's clients expect."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


Stop = Annotated[str, Field(min_length=1, max_length=256)]


class Sampled(BaseModel):
    """What both kinds of requests have. Fields that would change nothing here are accepted and ignored."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=2**31 - 1)  # OpenAI has none
    ignore_eos: bool | None = None  # nor this, which vLLM's server has
    n: int | None = Field(None, ge=1, le=128)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    max_tokens: int | None = Field(None, ge=0)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    presence_penalty: float | None = Field(None, ge=0, le=0)
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class Completion(Sampled):
    """A body of /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=TOP)
    echo: bool | None = None
    best_of: int | None = None
    suffix: None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class TextFormat(BaseModel):
    type: Literal["text"]


class Chat(Sampled):
    """A body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=TOP)
    response_format: TextFormat | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None


class ScoredText(BaseModel):
    """A prompt and its response, or messages that end with the response."""

    model_config = ConfigDict(extra="forbid")
    prompt: str | None = None
    response: str | None = None
    messages: Annotated[list[Message], Field(min_length=2)] | None = None

    def record(self) -> dict[str, Any]:
        """Raises ApiError for neither of both."""
        if self.messages is not None and self.prompt is self.response is None:
            return {"messages": [message.plain() for message in self.messages]}
        if self.messages is None and self.prompt is not None and self.response is not None:
            return {"prompt": self.prompt, "response": self.response}
        raise ApiError(400, "input: expected prompt and response, or messages", "input")


class Scores(BaseModel):
    """A body of /v1/scores, which is no path of OpenAI's."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str
    input: Annotated[list[ScoredText], Field(min_length=1, max_length=1024)]


def parse(kind: type, body: Any) -> Any:
    """The request of a JSON body. Raises ApiError, which names the field."""
    if not isinstance(body, dict):
        raise ApiError(400, "the body is no JSON object")
    try:
        request = kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part in body)
        name = name or str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            raise ApiError(400, f"Unrecognized request argument supplied: {name}", name) from None
        raise ApiError(400, f"{name}: {first['msg'][:1].lower()}{first['msg'][1:]}", name) from None
    if isinstance(request, Completion) and request.best_of not in (None, request.n or 1):
        raise ApiError(400, f"best_of: {request.best_of}: expected {request.n or 1}, which is n", "best_of")
    if isinstance(request, Chat) and request.top_logprobs and not request.logprobs:
        raise ApiError(400, "top_logprobs: needs logprobs: true", "top_logprobs")
    return request
