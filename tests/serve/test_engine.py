"""Responses of the slots: those of `jaxrlhf generate`, whatever else is computed beside them."""

import itertools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.generate.config import GenerateConfig
from jaxrlhf.models.heads import lm_logits
from jaxrlhf.models.transformer import Runtime, forward
from jaxrlhf.serve import writer
from jaxrlhf.serve.engine import Engine, Full
from jaxrlhf.serve.jobs import Job, ResponseSettings
from jaxrlhf.serve.writer import encode_record
from jaxrlhf.sharding import MeshConfig, make_mesh
from tests.support.runs import COMPILED
from tests.support.served import generated

PROMPT = "the film is warm and its script"
LONG = "the film is warm and its script " * 12  # several chunks, and wider caches
SAMPLED = ResponseSettings(8, temperature=0.8, top_p=0.9, seed=7)


class Ended(Job):
    """A job that is waited for."""

    def __init__(
        self, service, prompt: str | list[int], ask: ResponseSettings, sample_id: int = 0, then=lambda job: None
    ):
        self.done, self.then = threading.Event(), then
        ids = encode_record(service.model, {"prompt": prompt}) if isinstance(prompt, str) else prompt
        super().__init__(np.asarray(ids, np.int32), ask, sample_id, self.look, streams=True)
        self.engine: Engine = service.engine

    def look(self) -> None:
        self.then(self)
        if self.reason:
            self.done.set()

    @property
    def ids_out(self) -> list[int]:
        assert self.done.wait(60)
        return [said.token for said in self.tokens]


def run(service, *jobs: Ended) -> list[list[int]]:
    service.engine.submit(jobs)
    return [job.ids_out for job in jobs]


def decoded(service, ids: list[int]) -> str:
    return service.model.tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("prompt", [PROMPT, LONG])
def test_the_text_is_that_of_generate(service, folder, prompt):
    """Also of several samples, each from its own noise."""
    cfg = GenerateConfig(8, temperature=0.8, top_p=0.9)
    expected = generated(folder, prompt, cfg, 7, 2)
    found = run(service, *(Ended(service, prompt, SAMPLED, copy) for copy in range(2)))
    assert [decoded(service, ids) for ids in found] == [response.text for response in expected]
    assert found[0] != found[1]


def test_a_response_does_not_depend_on_its_company_nor_on_when_it_joins(service):
    (alone,) = run(service, Ended(service, PROMPT, SAMPLED))
    others = [Ended(service, LONG, ResponseSettings(24, seed=seed)) for seed in range(6)]  # more than there are slots
    late = Ended(service, PROMPT, SAMPLED)

    def join(job: Job) -> None:
        if len(job.tokens) == 3 and not late.tokens and late not in service.engine.queue:
            service.engine.submit([late])

    others[0].then = join
    service.engine.submit(others)
    assert late.ids_out == alone
    assert len({tuple(job.ids_out) for job in others}) == 6


def test_an_end_token_can_be_ignored(service, monkeypatch):
    """The response is the same until then, and goes on. Here the third token that is sampled becomes an end token."""
    ask = SAMPLED._replace(ignore_eos=True)
    (whole,) = run(service, Ended(service, PROMPT, ask))
    end = whole[2]
    monkeypatch.setattr(service.engine, "eos_ids", frozenset([end]))
    ended, ignoring = Ended(service, PROMPT, SAMPLED), Ended(service, PROMPT, ask)
    found = run(service, ended, ignoring)
    assert found == [whole[: whole.index(end) + 1], whole] and len(whole) == SAMPLED.max_tokens
    assert (ended.reason, ignoring.reason) == ("eos", "length")


def noted(monkeypatch, service, *names: str) -> list[tuple[str, int]]:
    """What the engine has computed: the programs, each with the seats that it read, or the slots that there were."""
    calls, slots = [], service.engine.slots

    def note(name: str) -> None:
        compute = getattr(slots, name)

        def noting(*given):
            calls.append((name, len(given[0])))
            return compute(*given)

        monkeypatch.setattr(slots, name, noting)

    for name in names:
        note(name)
    return calls


def test_prompts_that_wait_are_computed_together(service, folder, monkeypatch):
    """Also those of other lengths; their texts are those of generate."""
    prompts = [PROMPT, "the film", LONG, "its script is warm", "a"]
    calls = noted(monkeypatch, service, "read")
    cfg = GenerateConfig(8, temperature=0.8, top_p=0.9)
    found = run(service, *(Ended(service, prompt, SAMPLED) for prompt in prompts))
    assert [decoded(service, ids) for ids in found] == [generated(folder, text, cfg, 7)[0].text for text in prompts]
    assert calls[0] == ("read", 4)  # the seats: one is for the fifth once another is free


def test_a_long_prompt_does_not_stop_the_others(service, monkeypatch):
    """A token of theirs is computed between two of its chunks."""
    calls = noted(monkeypatch, service, "read", "decode")
    long = Ended(service, LONG, SAMPLED)
    short = Ended(service, PROMPT, ResponseSettings(24, seed=1))
    short.then = lambda job: service.engine.submit([long]) if len(job.tokens) == 2 else None
    run(service, short)
    assert len(long.ids_out) == 8
    order = [name for name, _ in calls]
    assert order.count("read") > 2
    later = order[order.index("read", 1) :]
    assert ("read", "read") not in itertools.pairwise(later)


def test_few_slots_are_computed_where_few_are_in_use(service, monkeypatch):
    """A response goes on where the number of slots changes, with the same tokens."""
    ask = ResponseSettings(60, temperature=2.0, seed=5)
    (alone,) = run(service, Ended(service, PROMPT, ask))
    calls = noted(monkeypatch, service, "decode")
    found = run(service, *(Ended(service, PROMPT, ask if at == 2 else ResponseSettings(3, seed=at)) for at in range(3)))
    assert found[2] == alone
    assert {size for _, size in calls} == {1, 4} and calls[-1][1] == 1


def test_a_slot_is_free_and_counted_before_its_end_is_told(service):
    engine, seen = service.engine, []
    job = Ended(service, PROMPT, SAMPLED)
    before = engine.counts.responses
    job.then = lambda job: seen.append((engine.running, engine.counts.responses - before)) if job.reason else None
    run(service, job)
    assert seen == [(0, 1)]


def test_nothing_compiles_after_warm_up(service):
    events: list[str] = []
    listen = lambda event, duration_secs, **_: events.append(event) if event.endswith(COMPILED) else None
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        asks = [
            ResponseSettings(5, 0.0),
            ResponseSettings(9, 1.3, 0.5, 3, 2),
            ResponseSettings(3, logprobs=True, of_prompt=True),
            ResponseSettings(4, stop=("a", "b")),
        ]
        run(service, *(Ended(service, prompt, ask) for ask in asks for prompt in (PROMPT, LONG, [5])))
        run(service, Ended(service, PROMPT, asks[0]))  # in caches of the smallest width again
        jax.jit(lambda x: x + 17)(1)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(events) == 1  # the listener hears: the last one is ours


@pytest.mark.nightly  # by day: a prompt after the other, above
def test_settings_are_of_each_row(service, folder):
    """Greedy, top-k and sampled rows stand in one batch."""
    cfgs = [GenerateConfig(8, temperature=0.0), GenerateConfig(8, top_k=3), GenerateConfig(8)]
    asks = [ResponseSettings(8, 0.0, seed=3), ResponseSettings(8, top_k=3, seed=3), ResponseSettings(8, seed=3)]
    found = run(service, *(Ended(service, PROMPT, ask) for ask in asks))
    assert [decoded(service, ids) for ids in found] == [generated(folder, PROMPT, cfg, 3)[0].text for cfg in cfgs]
    assert len({tuple(ids) for ids in found}) == 3


def test_a_stop_text_ends_a_response_where_generate_does(service, folder):
    free = generated(folder, PROMPT, GenerateConfig(8, temperature=0.0))[0].text
    stop = free[len(free) // 2 : len(free) // 2 + 2]
    (expected,) = generated(folder, PROMPT, GenerateConfig(8, temperature=0.0, stop=("@@", stop)))
    job = Ended(service, PROMPT, ResponseSettings(8, 0.0, stop=("@@", stop)))
    (ids,) = run(service, job)
    assert [decoded(service, ids), job.reason, len(ids)] == [expected.text, expected.finish_reason, expected.tokens]
    assert job.reason == "stop"


def test_what_is_told_is_what_the_model_says(service, folder):
    """Log-probs of prompt and response against a forward pass over all of it, whatever the temperature is."""
    job = Ended(service, LONG, ResponseSettings(4, temperature=0.5, seed=1, logprobs=True, of_prompt=True))
    run(service, job)
    said = [*job.prompt, *job.tokens]
    row = jnp.array([[*job.ids, *(x.token for x in job.tokens)]])
    assert [x.token for x in said] == row[0, 1:].tolist()
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        model = writer.read_model(str(folder), mesh)
        hidden = forward(model.params, model.config, row, jnp.ones_like(row), Runtime())
        logprobs = np.asarray(jax.nn.log_softmax(lm_logits(model.params, model.config, hidden)))[0, :-1]
    own = np.take_along_axis(logprobs, np.asarray(row)[0, 1:, None], 1)[:, 0]
    np.testing.assert_allclose(np.array([x.logprob for x in said], float), own, atol=2e-5)
    best = np.sort(logprobs, 1)[:, ::-1][:, : len(said[0].top)]
    np.testing.assert_allclose([[logprob for _, logprob in x.top] for x in said], best, atol=2e-5)
    assert [x.top[0][0] for x in said] == logprobs.argmax(1).tolist()


def test_a_job_that_is_given_up_frees_its_slot(service):
    before = service.engine.counts.cancelled
    given_up = [Ended(service, PROMPT, ResponseSettings(200, seed=seed)) for seed in range(4)]  # all the slots
    for job in given_up:
        job.then = lambda job: service.engine.cancel([job]) if len(job.tokens) == 2 else None
    (ids,) = run(service, *given_up, Ended(service, PROMPT, SAMPLED))[4:]
    assert len(ids) == 8
    assert [job.reason for job in given_up] == ["cancelled"] * 4
    assert all(len(job.tokens) < 8 for job in given_up)
    assert service.engine.counts.cancelled == before + 4


def test_a_queue_that_is_full_takes_no_more(service):
    engine = service.engine
    most = engine.most + engine.slots.count
    with pytest.raises(Full, match="wait already; 64 may"):
        engine.submit([Ended(service, PROMPT, SAMPLED) for _ in range(most + 1)])
    assert not engine.queue


def test_a_mistake_ends_the_jobs_that_were_computed_and_no_other(service, monkeypatch, capsys):
    slots = service.engine.slots
    with monkeypatch.context() as patch:
        patch.setattr(slots, "decode", lambda *_: 1 / 0)
        job = Ended(service, PROMPT, SAMPLED)
        run(service, job)
    assert job.reason == "error" and "ZeroDivisionError" in capsys.readouterr().err
    assert len(run(service, Ended(service, PROMPT, SAMPLED))[0]) == 8
