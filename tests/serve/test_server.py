"""The HTTP server, asked by OpenAI's own client."""

from typing import Any

import openai  # pyright: ignore[reportMissingImports]
import pytest

from jaxrlhf.generate.config import GenerateConfig
from jaxrlhf.serve.service import public_name
from tests.serve.conftest import CONTEXT
from tests.support.served import PROMPT, complete, generated


def chat(client: openai.OpenAI, **asked: Any) -> Any:
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": PROMPT}]
    return client.chat.completions.create(
        **({"model": "tiny", "messages": messages, "max_completion_tokens": 8, "seed": 3} | asked)
    )


# ---- text -----------------------------------------------------------------------------------------------------------


def test_the_example(client, folder):
    """Its text is that of `jaxrlhf generate` with the same seed."""
    reply = complete(client, max_tokens=100, n=1, stop=None, temperature=0.5)
    (expected,) = generated(folder, PROMPT, GenerateConfig(100, temperature=0.5), 3)
    assert [choice.text for choice in reply.choices] == [expected.text]
    assert reply.choices[0].finish_reason == {"length": "length", "eos": "stop"}[expected.finish_reason]
    assert reply.usage.completion_tokens == expected.tokens
    assert [reply.object, reply.model, reply.choices[0].logprobs] == ["text_completion", "tiny", None]


def test_many_prompts_with_many_responses(client, service):
    """In their order; token ids are prompts, too; each number comes from its own noise."""
    ids = service.model.tokenizer(PROMPT)["input_ids"]
    reply, by_ids = (complete(client, prompt=[given, given], n=2) for given in (PROMPT, ids))
    texts = [choice.text for choice in reply.choices]
    assert texts == [choice.text for choice in by_ids.choices]
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3] and len(set(texts)) == 4
    assert complete(client).choices[0].text == texts[0]
    assert complete(client, seed=4).choices[0].text != texts[0]
    assert reply.usage.prompt_tokens == 2 * len(ids)


def test_a_stop_text_is_left_out(client):
    free = complete(client, max_tokens=20).choices[0].text
    stop = free[8:10]
    choice = complete(client, max_tokens=20, stop=["@@", stop]).choices[0]
    assert [choice.text, choice.finish_reason] == [free[: free.index(stop)], "stop"]
    streamed = [part.choices[0].text for part in complete(client, max_tokens=20, stop=stop, stream=True)]
    assert "".join(streamed) == choice.text


def test_a_stream_is_the_whole_in_parts(client):
    whole = complete(client, max_tokens=20, n=2, logprobs=2, echo=True)
    parts = list(
        complete(client, max_tokens=20, n=2, logprobs=2, echo=True, stream=True, stream_options={"include_usage": True})
    )
    *texts, last = parts
    assert last.choices == [] and last.usage == whole.usage and len(texts) > 2  # more than one of each
    for choice in whole.choices:
        own = [part.choices[0] for part in texts if part.choices[0].index == choice.index]
        assert "".join(part.text for part in own) == choice.text
        assert [part.finish_reason for part in own] == [None] * (len(own) - 1) + [choice.finish_reason]
        for name in ("tokens", "token_logprobs", "top_logprobs"):
            found = [x for part in own if part.logprobs for x in getattr(part.logprobs, name)]
            assert found == getattr(choice.logprobs, name), name


def test_logprobs_of_an_echoed_prompt(client, service):
    """What lm-eval reads: the first token has none; the likeliest token is the greedy one."""
    ids = service.model.tokenizer(PROMPT)["input_ids"]
    (choice,) = complete(client, prompt=[ids], max_tokens=1, echo=True, logprobs=1, temperature=0).choices
    told = choice.logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(ids) + 1
    assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
    assert all(logprob <= max(top.values()) for logprob, top in zip(told.token_logprobs[1:], told.top_logprobs[1:]))
    assert told.token_logprobs[-1] == max(told.top_logprobs[-1].values())
    nothing = complete(client, prompt=[ids], max_tokens=0, echo=True, logprobs=1).choices[0]
    assert nothing.logprobs.token_logprobs == told.token_logprobs[:-1]


def test_a_conversation(client, service):
    """The prompt is what the chat template makes of it, and a stream is the whole in parts."""
    reply = chat(client, logprobs=True, top_logprobs=2)
    (choice,) = reply.choices
    prompt = f"system: a\nuser: {PROMPT}\nassistant:"
    ids = service.model.tokenizer.encode(prompt, add_special_tokens=False)
    assert choice.message.content == complete(client, prompt=ids).choices[0].text
    assert len(choice.logprobs.content) == 8 and len(choice.logprobs.content[0].top_logprobs) == 2
    parts = [part.choices[0] for part in chat(client, stream=True)]
    assert parts[0].delta.role == "assistant" and parts[-1].finish_reason == choice.finish_reason
    assert "".join(part.delta.content or "" for part in parts) == choice.message.content


def test_a_conversation_may_take_what_the_context_leaves(client):
    reply = chat(client, max_completion_tokens=None)
    assert reply.usage.total_tokens == CONTEXT or reply.choices[0].finish_reason == "stop"


def test_a_model_without_a_chat_template(client, service, monkeypatch):
    monkeypatch.setattr(service.model.tokenizer, "chat_template", None)
    with pytest.raises(openai.BadRequestError, match="no chat template; expected a prompt, at /v1/completions"):
        chat(client)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked, expected, param",
    [
        ({"extra_body": {"colour": 1}}, "Unrecognized request argument supplied: colour", "colour"),
        ({"temperature": 3}, "temperature: input should be less than or equal to 2", "temperature"),
        ({"max_tokens": 1000}, f"maximum context length is {CONTEXT} tokens", "max_tokens"),
        ({"prompt": []}, "prompt: expected one at least", "prompt"),
        ({"prompt": [[1, 5000]]}, "prompt: token 5000: expected ids in [0, ", "prompt"),
        ({"logprobs": 6}, "logprobs: input should be less than or equal to 5", "logprobs"),
        ({"stop": ["a"] * 5}, "stop: ", "stop"),
        ({"best_of": 2}, "best_of: 2: expected 1", "best_of"),
        ({"frequency_penalty": 1.0}, "frequency_penalty: input should be less than or equal to 0", "frequency_penalty"),
        ({"n": 100}, "n: 100 responses to 1 prompts; the server has room for 68", "n"),
    ],
)
def test_a_mistake_is_named(client, asked, expected, param):
    with pytest.raises(openai.BadRequestError) as error:
        complete(client, **asked)
    body: Any = error.value.body
    assert expected in body["message"]
    assert body["param"] == param and body["type"] == "invalid_request_error"


def test_another_model_and_another_path(client):
    with pytest.raises(openai.NotFoundError, match="The model '/etc/passwd' does not exist; this server has 'tiny'"):
        complete(client, model="/etc/passwd")
    with pytest.raises(openai.NotFoundError, match="No such path: POST /v1/embeddings"):
        client.embeddings.create(model="tiny", input="a")


def test_models(client):
    assert [model.id for model in client.models.list()] == [client.models.retrieve("tiny").id] == ["tiny"]
    names = {"runs/a/ppo/": "ppo", "gguf:/x/smol.gguf": "smol.gguf", "ppo@best": "ppo@best", "/": "model"}
    assert [public_name(name) for name in names] == [*names.values()]
