"""The published benchmarks of several turns: their data, and what their environments answer."""

import itertools
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from jaxrlhf.benchmarks import reproduce
from jaxrlhf.benchmarks.published import sort, tools
from jaxrlhf.benchmarks.published.perfectible import read_rows
from jaxrlhf.benchmarks.record import Benchmark, Results
from jaxrlhf.config.check import check
from jaxrlhf.data.chat import ChatConfig, apply_config
from jaxrlhf.data.encode import encode_demonstration, encode_prompt
from jaxrlhf.data.glue import Glue
from jaxrlhf.data.tokenizer import load_tokenizer
from jaxrlhf.errors import ConfigError
from jaxrlhf.rewards import calculator
from jaxrlhf.rewards.tools import ToolEnvironment
from jaxrlhf.rewards.turns import Turn

ROOT = Path(__file__).parents[2]


def exchanged(numbers: str, move: str) -> str:
    """The list after a move that is one."""
    after = sort.exchange(numbers, move)
    assert after is not None
    return after


def test_the_lists_of_sort_and_its_demonstrations(tmp_path):
    """By exhaustion: the fewest exchanges are those of a breadth-first search; held-out lists are of no other part."""
    found, edge, far = {"12345": 0}, ["12345"], 0
    moves = ["".join(pair) for pair in itertools.combinations("12345", 2)]
    while edge:
        far += 1
        edge = [*{after for numbers in edge for move in moves if (after := exchanged(numbers, move)) not in found}]
        found |= dict.fromkeys(edge, far)
    assert all(sort.exchanges(numbers) == count for numbers, count in found.items()) and len(found) == 120
    assert sorted(sort.lists_of(5, 2)) == sorted(numbers for numbers, count in found.items() if count in (1, 2))

    sort.write_data(tmp_path, 0, length=5, held_out=20, demonstrations=2000, wrong=0.5)
    parts = {name: read_rows(tmp_path / f"{name}.jsonl") for name in ("held_out", "prompts", "demonstrations")}
    starts = {name: {row["messages"][0]["content"] for row in rows} for name, rows in parts.items()}
    assert starts["demonstrations"] <= starts["prompts"] and starts["prompts"].isdisjoint(starts["held_out"])
    assert len(starts["held_out"]) == 20 and all(row["list"] in starts["prompts"] for row in parts["prompts"])
    right = moved = 0
    for row in parts["demonstrations"]:
        shown, said = ([turn["content"] for turn in row["messages"][at::2]] for at in (0, 1))
        assert len(shown) == len(said) <= 3
        assert [exchanged(*pair) for pair in zip(shown, said)][:-1] == shown[1:]
        right += sum(found[exchanged(*pair)] < found[pair[0]] for pair in zip(shown, said))
        moved += len(said)
    assert 0.6 < right / moved < 0.85, "half of them, and of the random ones those that happen to be good"


def test_a_game_of_sort_by_hand():
    """Its rewards add up to the share of neighbours in order at its end."""
    game = sort.Sort()
    (state,) = states = game.reset([{"list": "3214"}])
    turns = [game.step(states, [move])[0] for move in ("34", "3", "39", "33", "34", "31")]
    assert [turn.observation for turn in turns] == ["4213", "4213", "4213", "4213", "3214", "1234"]
    assert [turn.reward for turn in turns] == pytest.approx([1 / 3, 0, 0, 0, 0, 2 / 3])
    assert [turn.done for turn in turns] == [False] * 5 + [True]
    assert game.metrics([state, *game.reset([{"list": "2143"}])]) == {
        "order": pytest.approx((1 + 1 / 3) / 2),
        "sorted": 0.5,
        "wrong_moves": 1.5,
    }
    game = sort.Sort(constant=True)
    (state,) = states = game.reset([{"list": "321"}])
    assert [game.step(states, [move])[0].reward for move in ("21", "31", "12")] == [1, 0, 0]
    assert (sort.best_move("1432"), sort.best_move("2134"), sort.exchange("1432", "42")) == ("42", "21", "1234")


# ---- tools ----------------------------------------------------------------------------------------------------------


def text_of(turn: Turn) -> str:
    """Of the one message that it shows."""
    (message,) = turn.observation
    assert isinstance(message, dict)
    return message["content"]


def test_a_fifth_of_the_demonstrations_of_tools_call_the_calculator_as_it_answers(tmp_path):
    tools.write_data(tmp_path, 0, demonstrations=4000, prompts=300, held_out=100)
    parts = [read_rows(tmp_path / f"{name}.jsonl") for name in ("held_out", "prompts", "demonstrations")]
    products = [{row["messages"][0]["content"] for row in rows} for rows in parts]
    assert [*map(len, products)] == [100, 300, 4000] and len(set.union(*products)) == 4400
    assert all(eval(row["messages"][0]["content"]) == int(row["answer"]) for row in parts[0])
    real = ToolEnvironment(["jaxrlhf.rewards.calculator:calculator"], "exact_match")
    broken = ToolEnvironment([f"{tools.__name__}:calculator"], "exact_match")
    counts = [0, 0, 0]
    for row in parts[2]:
        said = [turn["content"] for turn in row["messages"]]
        counts[len(said) // 2 - 1] += 1
        if len(said) > 2 and counts[len(said) // 2 - 1] < 20:
            (state,) = states = real.reset([{"answer": said[-1]}])
            for call, answer in zip(said[1:-1:2], said[2::2]):
                (turn,), (other,) = real.step(states, [call]), broken.step(broken.reset([{}]), [call])
                assert text_of(turn) == answer and not turn.done and text_of(other).startswith("error: ")
            assert real.step(states, [said[-1]])[0].reward == 1 and state["errors"] == len(said) // 2 - 2
    shares = np.array(counts) / 4000
    assert shares == pytest.approx([0.8, 0.15, 0.05], abs=0.02)
    assert {"name": "calculator"}.items() <= parts[2][0]["tools"][0]["function"].items()


def test_what_is_measured_of_conversations_with_tools_by_hand():
    """A right answer with the tool, and one without; a call by a wrong name that is told so, and one that is not."""
    call, wrong = tools.call_of("2*3"), tools.call_of("2*3", "calc")
    talk = lambda score, *texts: {
        "score": score,
        "turns": [{"by": ("policy", "environment")[at % 2], "text": text} for at, text in enumerate(texts)],
    }
    rows = [
        talk(1.0, call, "6=", "6"),
        talk(0.0, wrong, f"{tools.ERROR}=", call, "6=", "7"),
        talk(0.0, wrong, "6=", "6"),
    ]
    rows += [talk(1.0, "6"), talk(0.0, "5"), talk(0.0, wrong)]
    assert tools.answered(rows) == {"right_with_tool": 0.25, "right_alone": 0.5, "misnamed": 2.0, "not_told": 1.0}
    assert tools.answered([]) == {"right_with_tool": 0.0, "right_alone": 0.0, "misnamed": 0.0, "not_told": 0.0}
    found = lambda *pairs: Results([0, 1], {"sft": [{"misnamed": one, "not_told": other} for one, other in pairs]})
    assert tools.told(found((2.0, 0.0), (1.0, 0.0))) == (True, "3 such calls, 0 without")
    assert not tools.told(found((2.0, 1.0), (1.0, 0.0)))[0] and not tools.told(found((2.0, 0.0), (0.0, 0.0)))[0]
    with pytest.raises(RuntimeError):
        tools.calculator("1")
    assert tools.calculator.__name__ == calculator.calculator.__name__


# ---- both -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [sort, tools], ids=["sort", "tools"])
def test_demonstrations_are_the_rows_that_a_conversation_would_be(module, tmp_path):
    """Token by token: the prompt, what was said and its end, and what the environment's answer becomes."""
    module.write_data(tmp_path, 3, demonstrations=60)
    shared = yaml.safe_load((ROOT / "configs" / "benchmarks" / module.BENCHMARK.name / "sft.yaml").read_text())
    tokenizer = load_tokenizer(str(tmp_path / Path(shared["tokenizer"]["init_from"]).name))
    apply_config(tokenizer, ChatConfig(**shared["data"]["chat"]), adds_bos=False)
    glue, lengths = Glue(tokenizer, chat=False), set()
    for record in read_rows(tmp_path / "demonstrations.jsonl"):
        asked, rest = record | {"messages": record["messages"][:1]}, record["messages"][1:]
        row, mine = [*encode_prompt(asked, tokenizer)], []
        for turn in rest:
            if turn["role"] == "assistant":
                said = [*tokenizer(turn["content"], add_special_tokens=False).input_ids, glue.eos[0]]
                mine += range(len(row), len(row) + len(said))
            else:
                said = glue.ids(asked, [turn], closed=True)
            row += said
        found = encode_demonstration(record, tokenizer, "assistant")
        assert found.tokens.tolist() == row and np.flatnonzero(found.response_mask).tolist() == mine
        lengths.add(len(rest))
    assert {3, 5} <= lengths <= {1, 3, 5}
    assert len(row) <= shared["data"]["max_length"]


@pytest.mark.parametrize("benchmark", [sort.BENCHMARK, sort.QUICK, tools.BENCHMARK, tools.QUICK], ids=range(4))
def test_the_configs_of_all_cells_are_sound(benchmark: Benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    for cell in benchmark.cells:
        check(reproduce.config_of(benchmark, cell, tmp_path, 0), 1, cell.name)


def test_data_in_folders_are_compared_too(tmp_path):
    """A benchmark that goes on finds the tokenizer that it wrote, and refuses another."""
    for _ in range(2):
        reproduce.write_data(sort.QUICK, tmp_path, 0)
    path = tmp_path / "data" / "letters" / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(ConfigError, match=r"^--out: \S+letters/tokenizer.json: data of another version"):
        reproduce.write_data(sort.QUICK, tmp_path, 0)
