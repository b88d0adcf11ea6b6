"""The environments of jaxrlhf/rewards/README.md, as they are written there."""

import json
import re
import sys
import types

import pytest

from jaxrlhf import train as trainer
from jaxrlhf.rewards.calculator import calculator
from jaxrlhf.rewards.guess import Guess
from jaxrlhf.rewards.turns import TextEnvironment, Turn
from jaxrlhf.run.kept_programs import share_programs
from tests.support import conversing, runs

README = (runs.ROOT / "jaxrlhf" / "rewards" / "README.md").read_text()


def written(word: str) -> str:
    """The snippet of Python that has the word."""
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if word in block)
    return code


def imported(word: str, name: str, monkeypatch) -> types.ModuleType:
    """That snippet as a module."""
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(written(word), vars(module))
    return module


def test_the_environment_of_20_lines_trains(tmp_path, monkeypatch):
    """A tiny model of digits, stopped and resumed; its rewards are those of the snippet."""
    code = [line for line in written("class Guess").splitlines() if line and not line.startswith(("import", "from"))]
    assert len(code) <= 20
    imported("class Guess", "my_env", monkeypatch)
    more = {"environment.function": "my_env:Guess", "environment.arguments": {"price": 0.25}, "log.samples_every": 1}
    with share_programs():
        for count in (1, 2):
            assert trainer.run(conversing.config(tmp_path, "ppo", iterations=count, **more)) == "done"
    rows = [json.loads(line) for line in (tmp_path / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and all(row["kl/sampler_mismatch"] < 1e-6 for row in rows)
    assert all(-0.5 <= row["score/mean"] <= 1 and row["turns/mean"] > 1 for row in rows)
    samples = [json.loads(line) for line in (tmp_path / "ppo" / "samples.jsonl").read_text().splitlines()]
    told = [turn["text"] for row in samples for turn in row["turns"] if turn["by"] == "environment"]
    assert told and set(told) <= {"higher", "lower"}
    for row in samples:
        spoken = [turn["text"] for turn in row["turns"] if turn["by"] == "policy"]
        right = row["score"] > 0.4
        assert row["score"] == pytest.approx(right - 0.25 * (len(spoken) - right), abs=1e-4)


def test_guesses_are_answered():
    found = TextEnvironment("guess", Guess(price=0.5))
    states = found.reset([{"number": 5}] * 4)
    assert found.step(states, ["it is 7", "3", "what?", "3 or 5"]) == [
        Turn("lower", -0.5, False),
        Turn("higher", -0.5, False),
        Turn("Say a number.", -0.5, False),
        Turn("", 1.0, True),
    ]


def test_gymnasiums_environments_of_texts_are_played(monkeypatch):
    gymnasium = pytest.importorskip("gymnasium")

    class Echo(gymnasium.Env):
        observation_space = action_space = gymnasium.spaces.Text(99)

        def reset(self, *, seed=None, options=None):
            self.said = [str(seed)]
            return self.said[0], {}

        def step(self, action):
            self.said.append(action)
            return " ".join(self.said), len(action), len(self.said) > 2, False, {}

    if "EchoOfTests-v0" not in gymnasium.registry:
        gymnasium.register("EchoOfTests-v0", Echo, disable_env_checker=True)
    module = imported("class TextGym", "my_gym", monkeypatch)
    found = TextEnvironment("my_gym:TextGym", module.TextGym("EchoOfTests-v0"))
    states = found.reset([{"seed": 1}, {"seed": 2}])
    assert found.step(states, ["ab", "c"]) == [Turn("1 ab", 2.0, False), Turn("2 c", 1.0, False)]
    assert found.step(states[:1], ["d"]) == [Turn("1 ab d", 1.0, True)]


def test_the_calculator_computes_and_refuses():
    assert calculator("(2 + 3) * 4 - -1") == 21 and calculator("7 // 2 + 7 % 2 + 2 ** 3 / 4") == 6.0
    for text in (
        "2 +",
        "__import__('os')",
        "'a' * 3",
        "9 ** 9 ** 9",
        "x",
        "1 if 1 else 2",
        "True",
        "1" * 201,
        "2**-9999",
    ):
        with pytest.raises(ValueError):
            calculator(text)
    with pytest.raises(ZeroDivisionError):
        calculator("1 / 0")


def test_the_configs_name_what_is_there():
    for path in sorted((runs.ROOT / "configs" / "environments").glob("*.yaml")):
        assert f"configs/environments/{path.name}" in README, path
