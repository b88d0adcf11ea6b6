"""A policy that converses with an environment of text: rows token by token, limits, one width and several, stopped and
resumed."""

import json
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxrlhf import api
from jaxrlhf import train as trainer
from jaxrlhf.config.check import check
from jaxrlhf.config.resolved import resolve_config
from jaxrlhf.data.tokenizer import save_tokenizer, train_bpe
from jaxrlhf.errors import ConfigError
from jaxrlhf.evaluate.held_out import HeldOut, check_best
from jaxrlhf.run.build import build
from jaxrlhf.run.feed import Feed, glue_of
from jaxrlhf.run.initial_state import abstract_state, initial_state
from jaxrlhf.run.kept_programs import share_programs
from jaxrlhf.run.scoring import try_environment
from jaxrlhf.run.turns import Conversations, Growth, encode
from jaxrlhf.sharding import current
from jaxrlhf.types import Sequences, given
from tests.support import conversing, runs
from tests.support.iterated import iterated

START = 4  # columns of a prompt
ENDS = (0, 1, 2, 3, 4)  # tokens that end a response: EOS, and the stop texts 0, 1, 2, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("conversing")


@pytest.fixture(scope="module")
def conversed(folder):
    return iterated(conversing.config(folder, "ppo", **{"environment.arguments": {"price": 0.25}}))


def split(sequences: Sequences, row: int) -> list[tuple[bool, list[int]]]:
    """(by the policy, tokens) of each turn behind the prompt of a row."""
    columns = np.flatnonzero(sequences.valid[row, START:]) + START
    assert columns.tolist() == list(range(START, START + len(columns))), "a gap that is attended by nothing"
    turns: list[tuple[bool, list[int]]] = []
    for column in columns:
        own = bool(sequences.response_mask[row, column])
        if not turns or turns[-1][0] != own:
            turns.append((own, []))
        turns[-1][1].append(int(sequences.tokens[row, column]))
    return turns


def test_a_row_is_prompt_response_observation_response(conversed):
    """Row by row: what the environment showed, which tokens are the policy's, and where its rewards are."""
    _, metrics, rows, records = conversed
    letters, kinds = " " + conversing.LETTERS, set()
    for row, record in enumerate(records):
        assert [letters[t] for t in rows.tokens[row, :START][rows.valid[row, :START]]] == list(record["prompt"])
        turns = split(rows, row)
        whole = turns[0][1][-1] in ENDS  # else turn_tokens cut it
        assert [own for own, _ in turns] == ([True, False, True] if whole else [True])
        first = START + len(turns[0][1]) - 1
        assert rows.rewards[row, first] == -0.25
        if whole:
            assert "".join(letters[t] for t in turns[1][1]) == f"{record['secret']}>"
            right = letters[turns[2][1][-1]] == record["secret"]
            last = START + sum(len(tokens) for _, tokens in turns) - 1
            assert rows.rewards[row, last] == float(right) and rows.scores[row] == right - 0.25
            assert rows.ended[row] == (turns[2][1][-1] in ENDS)
            kinds.add((right, bool(rows.ended[row])))
        else:
            assert len(turns[0][1]) == 4 and rows.scores[row] == -0.25 and not rows.ended[row]
            kinds.add((None, False))
    assert len(kinds) >= 3, f"only {kinds} came up"
    assert not rows.rewards[~rows.response_mask].any() and not rows.logprobs[~rows.response_mask].any()
    assert metrics["return/mean"] == pytest.approx(rows.scores.mean(), rel=1e-6)
    assert metrics["response/length_mean"] == pytest.approx(rows.response_mask.sum(1).mean())
    assert metrics["turns/cut"] == pytest.approx(1 - rows.ended.mean())
    shown = rows.valid[:, START:] & ~rows.response_mask[:, START:]
    assert metrics["turns/observation_tokens"] == pytest.approx(shown.sum(1).mean())
    assert 1 < metrics["turns/mean"] <= 2 and 0 <= metrics["environment/right"] <= 1


def test_tokens_that_a_later_turn_has_otherwise_are_counted(folder, conversed, monkeypatch):
    """None in a run as it is; by hand; and all of them where rows are tokenised again."""
    assert conversed[1]["turns/changed_tokens"] == 0

    def seen(*rows: list[int]) -> Any:
        return types.SimpleNamespace(tokens=np.array(rows), valid=np.array(rows) > 0, response_start=2)

    growth = Growth(seen([0, 5, 6, 7], [8, 9, 1, 0], [5, 5, 5, 5]), 6)  # prompts of 1, 2 and 2 tokens
    later = seen([0, 5, 6, 7, 4], [8, 9, 2, 3, 3], [0, 0, 0, 5, 5])
    growth.saw(later, np.array([True, True, True]))
    assert growth.changed.tolist() == [0, 1, 2]
    growth.saw(seen([1] * 5, [1] * 5, [5] * 5), np.array([True, False, True]))  # the second row waits
    assert growth.changed.tolist() == [4, 1, 2]
    growth = Growth(seen([0, 5, 6, 7, 4]), 4)  # room for 3 tokens: the fourth is left out
    growth.saw(seen([5, 6, 7]), np.array([True]))
    assert growth.changed.tolist() == [0]

    observe = Conversations.observe

    def again(table, row, ids):
        table.tokens[row, table.begun[row]] += 1  # what was said is another token from now on
        return observe(table, row, ids)

    monkeypatch.setattr(Conversations, "observe", again)
    _, metrics, rows, _ = iterated(conversing.config(folder, "ppo", **{"environment.arguments": {"price": 0.25}}))
    spoke_on = [sum(own for own, _ in split(rows, row)) == 2 for row in range(len(rows.tokens))]
    assert metrics["turns/changed_tokens"] == pytest.approx(np.mean(spoke_on)) and any(spoke_on)


def test_log_probs_of_all_turns_are_those_of_a_forward_pass(conversed):
    assert conversed[1]["kl/sampler_mismatch"] < 1e-6


def test_what_is_sampled_depends_on_neither_the_widths_nor_the_other_rows(folder, conversed):
    """The same prompts in three widths, and half as many prompts: a token's noise is keyed by its row and place."""
    one = {"environment.arguments": {"price": 0.25}}
    rows = conversed[2]
    wide = iterated(conversing.config(folder, "ppo", **one, **{"environment.context_widths": 3}))[2]
    np.testing.assert_array_equal(wide.tokens, rows.tokens)
    np.testing.assert_array_equal(wide.response_mask, rows.response_mask)


@pytest.mark.parametrize(
    ("changes", "turns"),
    [
        # by day: the case after them
        pytest.param({"environment.max_turns": 1}, 1, marks=pytest.mark.nightly),  # nothing is shown behind the last
        pytest.param({"generate.max_new_tokens": 3}, 1, marks=pytest.mark.nightly),  # no room behind the observation
        ({"generate.max_new_tokens": 4}, 2),
    ],
)
def test_a_row_that_a_limit_cuts_is_unfinished(folder, changes, turns):
    more = {"environment.turn_tokens": 3, "algorithm.missing_eos_penalty": 0.5}
    _, metrics, rows, _ = iterated(conversing.config(folder, "grpo", **more | changes))
    spoken = [sum(own for own, _ in split(rows, row)) for row in range(len(rows.tokens))]
    assert max(spoken) == turns and rows.response_mask.any(1).all()
    assert metrics["turns/mean"] == pytest.approx(np.mean(spoken))
    assert (
        metrics["response/ended"] == pytest.approx(rows.ended.mean()) and metrics["turns/cut"] == 1 - rows.ended.mean()
    )
    if turns == 1:
        assert not rows.ended.any() and metrics["turns/observation_tokens"] == 0
    else:
        assert rows.ended.any() and (rows.valid[:, START:].sum(1) <= 4).all()


def test_held_out_conversations_are_measured_and_their_metrics_may_choose_the_best(folder):
    """Two batches of held-out prompts, 8 and 4: means over the 12, which are those of the rows."""
    changes = {"data.eval_prompts": {"path": str(folder / "prompts.jsonl")}, "eval.size": 12}
    changes |= {"checkpoint.best": "eval/environment/right", "eval.every": 1, "batch.samples_per_prompt": 1}
    ready = build(resolve_config(conversing.config(folder, **changes)), jax.devices()[:1], keep=False)
    with current(ready.mesh):
        held = HeldOut(ready)
        check_best(ready, held)  # the environment was not tried: what it measures is not known
        policy = given(held.policy, "policy")
        assert [host.real for host in policy.batches] == [8, 4]
        try_environment(ready, "data.eval_prompts", policy.batches[0].columns or [])
        check_best(ready, held)
        found = given(held.run(initial_state(ready)), "held out")
    assert set(held.names(abstract_state(ready))) == set(found.metrics), "as many as are promised"
    talks = [row["turns"] for row in found.samples]
    own = [sum(turn["by"] == "policy" for turn in turns) for turns in talks]
    assert found.metrics["turns/mean"] == pytest.approx(np.mean(own)) and len(own) == 12
    assert found.metrics["turns/changed_tokens"] == 0
    assert found.metrics["environment/right"] >= found.metrics["score/mean"] - 1e-6 >= 0
    known = given(ready.environment, "environment")
    known.metric_names = ["left"]
    with current(ready.mesh), pytest.raises(ConfigError, match=r"best: eval/environment/right: nothing that"):
        check_best(ready, held)


# ---- whole runs -----------------------------------------------------------------------------------------------------


@pytest.mark.nightly  # by day: a run of the README's environment, in rewards/test_readme_environment
def test_a_resumed_run_is_the_same_run_and_its_samples_show_turns(folder):
    """Bit for bit, its evaluations too."""
    more = {"data.eval_prompts": {"path": str(folder / "prompts.jsonl")}, "eval.every": 2, "eval.size": 8}
    more |= {"checkpoint.every": 2, "log.samples": 4, "log.samples_every": 1, "iterations": 4}
    whole, parts = (conversing.config(folder, **more | {"run_dir": str(folder / name)}) for name in ("whole", "parts"))
    with share_programs():
        assert trainer.run(whole) == "done"
        assert trainer.run(conversing.config(folder, **more | {"run_dir": parts.run_dir, "iterations": 2})) == "done"
        assert trainer.run(parts) == "done"
    words = ("time", "per_second", "memory/")  # of the machine
    own = lambda row: {name: value for name, value in row.items() if not any(word in name for word in words)}
    read = lambda cfg, name: [own(json.loads(line)) for line in (Path(cfg.run_dir) / name).read_text().splitlines()]
    first, second = ({json.dumps(row) for row in read(cfg, "metrics.jsonl")} for cfg in (whole, parts))
    assert first == second and len(first) == 7, "4 iterations, and what was measured at 0, 2 and 4"
    states = [runs.read_state(Path(cfg.run_dir), 4) for cfg in (whole, parts)]
    assert all(np.array_equal(states[1][path], leaf) for path, leaf in states[0].items())
    samples = read(whole, "samples.jsonl")
    assert {row["split"] for row in samples} == {"train", "eval"}
    for row in samples:
        assert row["response"] == "".join(turn["text"] for turn in row["turns"])
        spoken = [turn["by"] for turn in row["turns"]]
        assert spoken in (["policy"], ["policy", "environment", "policy"])
    assert any(len(row["turns"]) == 3 for row in samples)
    measured = [row for row in read(whole, "metrics.jsonl") if "eval/score/mean" in row]
    assert len(measured) >= 2 and all("eval/win_rate/reward" in row for row in measured)


@pytest.mark.nightly  # by day: text on eight devices, in test_mesh; rows of one device, above
@pytest.mark.parametrize(
    "devices", [{"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}, {"mesh.data": 8, "mesh.style": "pmap"}]
)
def test_eight_devices_do_what_one_does(folder, conversed, devices):
    _, _, rows, _ = conversed
    arguments = {"environment.arguments": {"price": 0.25}}
    _, _, others, _ = iterated(conversing.config(folder, "ppo", **arguments, **devices), 8)
    np.testing.assert_array_equal(rows.tokens, others.tokens)
    np.testing.assert_array_equal(rows.rewards, others.rewards)


@pytest.mark.nightly  # by day: packed responses of one turn, in test_response_widths
def test_packed_conversations_teach_the_same(folder, conversed):
    state, numbers, rows, _ = conversed
    changes = {"environment.arguments": {"price": 0.25}, "batch.pack_widths": 2, "batch.micro_batch_size": 16}
    packed, others, more, _ = iterated(conversing.config(folder, "ppo", **changes))
    np.testing.assert_array_equal(rows.tokens, more.tokens)
    for first, second in zip(jax.tree.leaves(state.params), jax.tree.leaves(packed.params), strict=True):
        np.testing.assert_allclose(first, second, atol=2e-6)
    assert numbers["loss/value"] == pytest.approx(others["loss/value"], rel=1e-4)


@pytest.mark.nightly
def test_the_policy_of_such_a_run_writes_responses_without_it(folder, tmp_path, monkeypatch):
    """What a run has taught is a model like any other."""
    cfg = conversing.config(folder, "grpo", iterations=1, run_dir=str(tmp_path / "run"))
    assert trainer.run(cfg) == "done"
    monkeypatch.delattr(conversing, "Show")
    (written,) = api.sample(cfg.run_dir, ["0?"], n=2, max_new_tokens=3)
    assert len(written) == 2


# ---- mistakes -------------------------------------------------------------------------------------------------------


SHOW = "environment.function: tests.support.conversing:Show"


@pytest.mark.parametrize(
    ("name", "changes", "line"),
    [
        ("sft", {"algorithm": {"name": "sft"}, "data.demonstrations": {"path": "x"}}, f"{SHOW}: sft samples no resp"),
        ("grpo", {"rewards.function": "my:f"}, f"rewards.function: given, and {SHOW} gives the rewards; expected null"),
        (
            "grpo",
            {"generate.min_new_tokens": 2},
            f"generate.min_new_tokens: 2: of a response, and {SHOW} makes",
        ),
        (
            "grpo",
            {"environment.turn_tokens": 11},
            "environment.turn_tokens: 11: more than .*; nearest: 10",
        ),
        ("grpo", {"environment.id": "CartPole-v1"}, "environment.id: CartPole-v1: function .* is given too"),
        ("grpo", {"environment.function": None}, "environment.max_turns: 2: there is no environment.function whose"),
        (
            "grpo",
            {"environment.function": "tests.support.conversing:Shows"},
            "has no Shows; nearest: Show",
        ),
    ],
)
def test_a_config_that_does_not_fit_is_one_line(folder, name, changes, line):
    with pytest.raises(ConfigError, match=line):
        check(conversing.config(folder, **changes), 1)


def test_a_row_that_a_turn_may_overrun_needs_a_model_as_long(folder):
    shape = conversing.SHAPE | {"max_positions": 17}
    line = r"max_positions: 17: less than 18 = .*prompt_buckets \+ generate.max_new_tokens 10 \+ 4 of a turn"
    with pytest.raises(ConfigError, match=line):
        check(conversing.config(folder, models={"policy": {"architecture": shape}}), 1)


# ---- tools ----------------------------------------------------------------------------------------------------------


def test_tools_are_part_of_prompts_and_their_results_of_rows(folder):
    """Through a chat template that writes them; the records' own tools stay."""
    template = (
        "{% if tools %}{% for t in tools %}<{{ t.function.name }}>{% endfor %}{% endif %}"
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    text = folder / "text"
    tokenizer = train_bpe(["calculator assistant user tool"], 300)
    save_tokenizer(tokenizer, str(folder / "bytes"))
    own = {"type": "function", "function": {"name": "own", "description": "x", "parameters": {"type": "object"}}}
    rows = [{"prompt": "2+2?", "answer": "4"}, {"prompt": "3?", "answer": "3", "tools": [own]}]
    text.mkdir()
    (text / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {
        "tokenizer.init_from": str(folder / "bytes"),
        "data.prompts": {"path": str(text / "questions.jsonl")},
        "data.chat": {"template": template},
        "data.prompt_buckets": [64],
        "environment.function": "jaxrlhf.rewards.tools:ToolEnvironment",
        "environment.arguments": {"tools": ["jaxrlhf.rewards.calculator:calculator"], "grader": "exact_match"},
        "models": {"policy": {"architecture": conversing.SHAPE | {"max_positions": 128}}},
        "batch.prompts_per_step": 2,
    }
    ready = build(resolve_config(conversing.config(folder, **changes)), jax.devices()[:1], keep=False)
    host, records = Feed(ready).next()
    prompts = given(host.prompts, "prompts")
    asked = [ready.tokenizer.decode(ids[ok]) for ids, ok in zip(prompts.tokens, prompts.valid)]
    assert sorted(asked) == ["<calculator>user:2+2?<eos>assistant:", "<own>user:3?<eos>assistant:"]
    environment = given(ready.environment, "environment")
    call = '<tool_call>{"name": "calculator", "arguments": {"expression": "2+2"}}</tool_call>'
    (turn,) = environment.step(environment.reset(records[:1]), [call])
    shown = encode(environment, glue_of(ready), records[0], turn.observation, closed=True)
    assert ready.tokenizer.decode(shown) == "tool:4<eos>assistant:"
    try_environment(ready, "data.prompts", records)


# ---- learning -------------------------------------------------------------------------------------------------------


@pytest.mark.nightly  # by day: one iteration, above
def test_a_tiny_model_learns_to_repeat_what_it_was_shown(folder):
    """Chance is one in four, and a digit that is always the same earns no more."""
    changes = {"iterations": 90, "batch.samples_per_prompt": 8, "environment.turn_tokens": 2, "algorithm.kl_coef": 0.0}
    changes |= {"optimizer": {"default": {"learning_rate": 1e-2}}, "algorithm.entropy_coef": 0.05}
    changes |= {"run_dir": str(folder / "learning")}
    assert trainer.run(conversing.config(folder, "grpo", **changes)) == "done"
    rows = [json.loads(line) for line in (folder / "learning" / "metrics.jsonl").read_text().splitlines()]
    means = [np.mean([row["score/mean"] for row in part]) for part in (rows[:5], rows[-10:])]
    assert means[0] < 0.35 and means[1] > 0.9, means
