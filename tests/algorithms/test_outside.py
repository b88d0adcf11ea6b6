"""Algorithms from outside the package: found beside you and beside the config, and every mistake in one line."""

import sys
from typing import Any, cast

import jax
import jax.numpy as jnp
import pytest

from jaxrlhf import user_code
from jaxrlhf.algorithm import Updates
from jaxrlhf.algorithms import ALGORITHMS, find, sft, validated
from jaxrlhf.config.load import load
from jaxrlhf.errors import ConfigError
from jaxrlhf.step import make_iteration
from jaxrlhf.types import Batch, Experience, Mean, TrainState, Trees
from tests.support import tiny

CONFIG = """
run_dir: run
iterations: 2
algorithm: {{name: "{name}", bonus: 2.0}}
models: {{policy: {{init_from: somewhere}}}}
data: {{demonstrations: {{path: a.jsonl}}}}
"""
GOOD = """
import dataclasses
from jaxrlhf.algorithms import sft

@dataclasses.dataclass(frozen=True)
class Mine:
    bonus: float = 1.0

MINE = sft.ALGORITHM._replace(config=Mine)
"""
OWN = """
old = sft.ALGORITHM
MINE = sft.Algorithm(config=Mine, online=False, batch=old.batch, roles=old.roles, updates=old.updates,
    prepare=old.prepare, loss=old.loss)
"""


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """(the working directory, the folder of a config), without what they leave in this process."""
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(user_code, "FOLDERS", [])
    before = {*sys.modules}
    yield here, there
    for name in {*sys.modules} - before:
        del sys.modules[name]


@pytest.mark.parametrize("where", [0, 1])
def test_a_module_beside_you_or_beside_the_config_is_found(folders, where):
    (folders[where] / "my_algorithm.py").write_text(GOOD)
    path = folders[1] / "mine.yaml"
    path.write_text(CONFIG.format(name="my_algorithm:MINE"))
    assert load(path).algorithm.bonus == 2.0
    assert find("my_algorithm:MINE") is find("my_algorithm:MINE")  # programs are compiled once for each


def test_a_run_directory_is_no_place_for_modules(folders):
    """Its folders (tensorboard) would pass for packages."""
    (folders[1] / "checkpoints").mkdir()
    (folders[1] / "config.yaml").write_text("")
    user_code.look_beside(folders[1] / "config.yaml")
    assert user_code.FOLDERS == []


BROKEN = {
    "no_module": (None, "no_module:MINE: no module no_module; expected"),
    "no_name": ("MIEN = 1", "no_name:MINE: no_name has no MINE; nearest: MIEN"),
    "a_function": ("def MINE(): pass", "a_function:MINE: function: expected an Algorithm of jaxrlhf.algorithm"),
    "a_class": ("class MINE: pass", "a_class:MINE: MINE: expected an Algorithm of jaxrlhf.algorithm"),
    "syntax": ("def f(:\n  pass", "syntax:MINE: importing syntax: SyntaxError: "),
    "raises": ("\n1 / 0", "raises:MINE: importing raises: ZeroDivisionError: division by zero ({here}/raises.py:2)"),
    "needs": ("import not_there", "needs:MINE: importing needs: ModuleNotFoundError: No module named 'not_there' ("),
    "missing": (
        "from jaxrlhf.algorithm import Algorithm\nMINE = Algorithm(config=int)",
        "missing:MINE: importing missing: TypeError: ",
    ),
    "a_dict": (GOOD.replace("config=Mine", "config={}"), "a_dict:MINE: its config is {{}}; expected a class under @"),
    "no_dataclass": (
        GOOD.replace("@dataclasses.dataclass(frozen=True)", ""),
        "no_dataclass:MINE: its config is the class Mine; expected a class under @dataclasses.dataclass(frozen=True)",
    ),
    "not_frozen": (
        GOOD.replace("(frozen=True)", ""),
        "not_frozen:MINE: its config is the class Mine; expected a class",
    ),
    "an_instance": (GOOD.replace("config=Mine", "config=Mine()"), "an_instance:MINE: its config is a Mine; expected"),
    "no_loss": (
        GOOD.replace("config=Mine", "config=Mine, loss=None"),
        "no_loss:MINE: its loss is None; expected a fun",
    ),
    "without_updates": (
        GOOD.replace("MINE = sft.ALGORITHM._replace(config=Mine)", OWN.replace(" updates=old.updates,", "")),
        "without_updates:MINE: importing without_updates: TypeError: Algorithm.__new__() missing 1 required positional "
        "argument: 'updates'",
    ),
    "without_online": (
        GOOD.replace("MINE = sft.ALGORITHM._replace(config=Mine)", OWN.replace("online=False, ", "")),
        "without_online:MINE: importing without_online: TypeError: Algorithm.__new__() missing 1 required positional "
        "argument: 'online'",
    ),
    "no_updates": (
        GOOD.replace("config=Mine", "config=Mine, updates=None"),
        "no_updates:MINE: its updates is None; expected a function",
    ),
    "perhaps_online": (
        GOOD.replace("config=Mine", "config=Mine, online='no'"),
        "perhaps_online:MINE: its online is 'no'; expected True or False",
    ),
    "online_without_prompts": (
        GOOD.replace("config=Mine", "config=Mine, online=True"),
        "online_without_prompts:MINE: batch returned ('sequences',); expected prompts among them, as it is online",
    ),
    "a_text": (
        GOOD.replace("config=Mine", "config=Mine, batch=lambda cfg: 'sequences'"),
        "a_text:MINE: batch returned 'sequences'; expected a tuple of fields of Batch: prompts, sequences, ",
    ),
    "no_field": (
        GOOD.replace("config=Mine", "config=Mine, batch=lambda cfg: ('ratings',)"),
        "no_field:MINE: batch returned the field ratings, which data do not fill; ",
    ),
    "no_roles": (
        GOOD.replace("config=Mine", "config=Mine, roles=lambda cfg: {'policy': 'lm'}"),
        "no_roles:MINE: roles returned {{'policy': 'lm'}}; expected (trained, slow), as in",
    ),
    "a_head": (
        GOOD.replace("config=Mine", "config=Mine, roles=lambda cfg: ({'policy': 'head'}, {})"),
        "a_head:MINE: roles returned ({{'policy': 'head'}}, {{}}); expected (trained, slow), as in",
    ),
    "attribute": (
        GOOD.replace("config=Mine", "config=Mine, roles=lambda cfg: cfg.nothing"),
        "attribute:MINE: roles raised AttributeError: 'Mine' object has no attribute 'nothing' ({here}/attribute.py:9)",
    ),
}


@pytest.mark.parametrize("module", BROKEN)
def test_a_mistake_in_the_record_is_one_line_before_anything_is_built(folders, module):
    from jaxrlhf.config.check import check

    here, _ = folders
    text, expected = BROKEN[module]
    if text is not None:
        (here / f"{module}.py").write_text(text)
    path = here / "mine.yaml"
    path.write_text(CONFIG.format(name=f"{module}:MINE"))
    with pytest.raises((ConfigError, validated.AlgorithmError)) as error:
        check(load(path), 1, str(path))
    assert expected.format(here=here) in str(error.value) and "\n" not in str(error.value)


# ---- what its functions answer --------------------------------------------------------------------------------------


ONE = Mean(jnp.float32(3), jnp.float32(2))
ROWS = Mean(jnp.ones(4), jnp.float32(4))

WRONG = {
    "loss returned a Mean; expected (a Mean for each of policy; dict of Means)": ("loss", ONE),
    "loss returned a Mean as the first; expected a dict of Means": ("loss", (ONE, {})),
    "loss returned 0.5 as 'policy'; expected a Mean(total, count) under a name": ("loss", ({"policy": 0.5}, {})),
    "loss returned losses of polcy; expected policy: what it trains": ("loss", ({"polcy": ONE}, {})),
    "loss returned losses of no role; expected policy: what it trains": ("loss", ({}, {})),
    "loss returned losses of policy, value; expected policy: what": ("loss", ({"policy": ONE, "value": ONE}, {})),
    "loss returned 'policy' with a total of shape (4,); expected one number": ("loss", ({"policy": ROWS}, {})),
    "loss returned an ArrayImpl as 'a/b'; expected a Mean": ("loss", ({"policy": ONE}, {"a/b": jnp.ones(2)})),
    "prepare returned an Experience; expected (Experience, dict of Means)": ("prepare", Experience()),
    "prepare returned a Batch as the first; expected Experience": ("prepare", (Batch(), {})),
    "prepare returned None; expected (Experience, dict of Means)": ("prepare", None),
    "prepare returned 1.0 as 'score'; expected a Mean": ("prepare", (Experience(), {"score": 1.0})),
    "rollout returned a Batch; expected Sequences": ("rollout", Batch()),
    "controls returned {'kl': 'x'}; expected a dict of f32[] by name": ("controls", {"kl": "x"}),
    "updates returned (1, 2); expected Updates(epochs, minibatches, stop)": ("updates", (1, 2)),
    "updates returned minibatches 0; expected an integer of 1 or more": ("updates", Updates(1, 0)),
    "updates returned the stop 0.1": ("updates", Updates(1, 1, cast(Any, 0.1))),
    "after_update returned None; expected TrainState": ("after_update", None),
    "after returned None; expected TrainState": ("after", None),
    "finish returned 'reward'; expected Normalization": ("finish", "reward"),
    "problems returned 'bonus: 1'; expected lines of text": ("problems", "bonus: 1"),
}


@pytest.mark.parametrize("expected", WRONG)
def test_a_wrong_answer_is_one_line(expected):
    part, answer = WRONG[expected]
    record = validated.checked("mine:MINE", sft.ALGORITHM._replace(**{part: lambda *_: answer}))
    with pytest.raises(validated.AlgorithmError) as error:
        getattr(record, part)(None, sft.SFTConfig())
    assert str(error.value).startswith(f"mine:MINE: {expected}") and "\n" not in str(error.value)


def test_a_stop_that_is_not_one_bool_is_one_line():
    updates = lambda cfg: Updates(stop=lambda metrics: jnp.ones(2))
    stop = validated.checked("mine:MINE", sft.ALGORITHM._replace(updates=updates)).updates(sft.SFTConfig()).stop
    assert stop is not None
    with pytest.raises(validated.AlgorithmError, match=r"^mine:MINE: stop returned an ArrayImpl; expected one bool$"):
        stop({})


@pytest.mark.parametrize("part", ["after", "after_update"])
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda x: x.astype(jnp.bfloat16), "slow['policy'] is bfloat16[3]; expected float32[3], as it was"),
        (lambda x: x[:2], "slow['policy'] is float32[2]; expected float32[3], as it was"),
        (lambda x: None, "slow['policy'] is nothing; expected float32[3], as it was"),
    ],
)
def test_a_state_of_another_shape_is_one_line(part, change, expected):
    """The loop over minibatches carries it: JAX would say so in forty lines."""
    state = TrainState(jnp.int32(0), jnp.int32(0), {}, {"policy": jnp.ones(3)}, {}, {})
    broken = lambda state, *_: state.replace(slow={"policy": change(state.slow["policy"])})
    record = validated.checked("mine:MINE", sft.ALGORITHM._replace(**{part: broken}))
    given = (state, {}, sft.SFTConfig()) if part == "after" else (state, sft.SFTConfig())
    with pytest.raises(validated.AlgorithmError) as error:
        getattr(record, part)(*given)
    assert str(error.value) == f"mine:MINE: {part} returned a state whose {expected}"


def test_what_a_function_raises_is_one_line_with_its_place():
    def loss(nets, trees: Trees, minibatch, cfg):
        return {"policy": nets.nothing}, {}

    record, nothing = validated.checked("mine:MINE", sft.ALGORITHM._replace(loss=loss)), cast(Any, None)
    line = loss.__code__.co_firstlineno + 1
    with pytest.raises(validated.AlgorithmError) as error:
        record.loss(nothing, nothing, nothing, sft.SFTConfig())
    where = f"({__file__}:{line})"
    assert str(error.value) == (
        f"mine:MINE: loss raised AttributeError: 'NoneType' object has no attribute 'nothing' {where}"
    )


BY_DAY = ("ppo", "ilql")  # the step of the others: tests/test_minimal.py


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in BY_DAY else pytest.mark.nightly) for name in ALGORITHMS]
)
def test_a_right_algorithm_passes(name):
    """Every one of the table, as if it came from outside."""
    cfg, batch = ALGORITHMS[name].config(), tiny.every_field()
    run = tiny.build(name, cfg, batch=batch, samples_per_prompt=2)
    recipe = run.recipe._replace(algorithm=validated.checked(f"mine:{name}", ALGORITHMS[name]))
    state, metrics, _ = jax.eval_shape(make_iteration(recipe), run.state, run.batch)
    assert metrics and jax.tree.structure(state) == jax.tree.structure(run.state)
