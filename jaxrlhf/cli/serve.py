"""``jaxrlhf serve``."""

from typing import Annotated, Literal

import typer

from jaxrlhf.cli.setup import StepOption, StrictOption, be_strict, name_step, set_flags


def serve(
    model: Annotated[str, typer.Argument(help="A run, RUN@best, a Hugging Face folder, gguf:FILE or a hub name.")],
    host: Annotated[
        str, typer.Option(help="The address to listen on; other than loopback it needs a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free port.")] = 8000,
    slots: Annotated[int, typer.Option(min=1, max=1024, help="Responses that are computed at once.")] = 8,
    queue: Annotated[int, typer.Option(min=0, help="Responses that may wait; a request beyond them gets 429.")] = 128,
    context: Annotated[int, typer.Option(min=2, help="Tokens of a prompt and its response together, at most.")] = 2048,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that a request may take.")] = 600.0,
    role: Annotated[
        Literal["policy", "reward"], typer.Option(help="policy: text; reward: /v1/scores of a reward model.")
    ] = "policy",
    name: Annotated[str, typer.Option(help="What clients call the model. Default: the last part of MODEL.")] = "",
    step: StepOption = "",
    strict: StrictOption = False,
) -> None:
    """Serve a model over HTTP as OpenAI's API has it. JAXRLHF_SERVE_TOKEN is the token that clients bring."""
    from jaxrlhf.errors import need_extra

    need_extra("jaxrlhf serve", "serve", "starlette", "uvicorn", "prometheus_client")
    model = name_step(model, step)
    set_flags()
    be_strict(strict)
    from jaxrlhf.serve.listen import Asked, check_address, serve_model
    from jaxrlhf.serve.server import Limits

    check_address(host)
    serve_model(Asked(model, slots, context, queue, name), role, host, port, Limits(seconds=timeout))
