"""The scores of a reward model over HTTP."""

import itertools
import json
import urllib.error
import urllib.request
from typing import Any

import jax
import numpy as np
import pytest

from jaxrlhf.evaluate.rewardbench import rewardbench_report
from jaxrlhf.rewards.functions import resolve
from jaxrlhf.serve import scorer
from jaxrlhf.serve.scorer import Scorer
from jaxrlhf.serve.server import Server
from jaxrlhf.serve.service import read_scores, widths_up_to
from jaxrlhf.sharding import make_mesh
from tests.support.runs import COMPILED
from tests.support.served import listening

INPUT: list[dict[str, Any]] = [
    {"prompt": "the film is", "response": " warm"},
    {"messages": [{"role": "user", "content": "the plot"}, {"role": "assistant", "content": "dull " * 20}]},
    {"prompt": "the plot", "response": " is dull and its script cold"},
]

GRADER = "reward_model_server"
LAST = INPUT[1]["messages"][-1]["content"]
RECORDS = [{**INPUT[0], "response": None}, {"messages": INPUT[1]["messages"][:-1]}, {"prompt": "the plot"}]


def post(address: str, body: Any) -> tuple[int, Any]:
    request = urllib.request.Request(f"{address}/scores", json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"]["message"]


def test_scores_are_those_of_the_scorer(folder, monkeypatch):
    monkeypatch.setattr(scorer, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:1]))
    name = str(folder.parent / "judge")
    service = read_scores(name, 2, 128, 4)
    service.warm_up()
    given = {"model": "judge", "batch": 2, "retries": 0}  # of the grader that asks such a server
    events: list[str] = []
    listen = lambda event, duration_secs, **_: events.append(event) if event.endswith(COMPILED) else None
    with listening(Server(service)) as address:
        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            status, told = post(address, {"model": "judge", "input": INPUT})
            graded = resolve(GRADER, given | {"url": address})([row.get("response", LAST) for row in INPUT], RECORDS)
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
        with pytest.raises(ValueError, match=r"The model 'other' does not exist.*; expected a URL and a model"):
            resolve(GRADER, given | {"url": address, "model": "other"})(["a"], RECORDS[:1])
        assert post(address, {"model": "judge", "input": [{"prompt": "a"}]})[0] == 400
        assert post(address, {"model": "other", "input": INPUT})[0] == 404
        long = [{"prompt": "a", "response": "dull " * 200}]
        assert "maximum context length is 128" in post(address, {"model": "judge", "input": long})[1]
        service.busy = 3
        assert post(address, {"model": "judge", "input": INPUT})[0] == 429
    assert status == 200 and not events
    expected = Scorer(name)(INPUT)
    np.testing.assert_allclose([one["score"] for one in told["data"]], expected, rtol=1e-5)
    assert len({round(score, 4) for score in expected}) == 3
    np.testing.assert_allclose(graded, expected, rtol=1e-5)
    assert told["usage"]["prompt_tokens"] > 30


def test_a_file_of_rewardbench_is_scored(folder, tmp_path, monkeypatch):
    """As the scorer scores conversations, whatever the order; a model with a chat template reads texts by it."""
    monkeypatch.setattr(scorer, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:1]))
    name, said = str(folder.parent / "judge"), ("dull " * 9, "warm", "cold and grim", "a film")
    rows = [{"prompt": "the plot", "chosen": a, "rejected": b, "subset": b[:4]} for a, b in itertools.pairwise(said)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [{"role": "user", "content": "the plot"}]
    scores = Scorer(name)([{"messages": [*asked, {"role": "assistant", "content": text}]} for text in said])
    expected = {b[:4]: float(x > y) for b, x, y in zip(said[1:], scores, scores[1:])}
    found = rewardbench_report(name, str(tmp_path / "rows.jsonl"))["rewardbench"]["subsets"]
    assert {subset: row["accuracy"] for subset, row in found.items()} == expected


def test_widths():
    assert [widths_up_to(context) for context in (20, 33, 200)] == [[32], [32], [32, 64, 128]]


def test_a_policy_gives_no_scores(folder):
    with pytest.raises(ValueError, match="a model with a lm head gives no scores"):
        read_scores(str(folder), 2, 128, 4)
