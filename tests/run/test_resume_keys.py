"""Every key of a config changed on resume: it goes on and says so, or is refused in one line with the way out; and what
a signal in an evaluation leaves to go on from."""

import collections
import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from jaxrlhf import train as trainer
from jaxrlhf.algorithms import ALGORITHMS
from jaxrlhf.config import roles
from jaxrlhf.config.check import check
from jaxrlhf.config.field_types import bare, type_under
from jaxrlhf.config.load import dump, load
from jaxrlhf.config.record import Config
from jaxrlhf.config.resolved import resolve_config
from jaxrlhf.config.yaml_text import flat, read_yaml
from jaxrlhf.errors import ConfigError
from jaxrlhf.evaluate.held_out import HeldOut, Result
from jaxrlhf.hosts.signals import Stop
from jaxrlhf.run import saved_run
from jaxrlhf.run.build import build
from jaxrlhf.run.checkpoint import Checkpoints
from jaxrlhf.run.initial_state import initial_state
from jaxrlhf.run.resume import changes_since_saved
from jaxrlhf.run.verified_steps import committed
from jaxrlhf.sharding import current
from jaxrlhf.types import TrainState
from tests.support import runs
from tests.test_minimal import write_models
from tests.test_train import count_steps

STEP = 2
PPO = """
run_dir: {folder}/run
iterations: 8
algorithm: {{name: ppo, reward_update: true, kl_controller: adaptive, old_logprobs: recompute}}
models:
  policy: {{init_from: {folder}/lm}}
  reward: {{init_from: {folder}/scalar}}
  value: {{init_from: policy, share_trunk: true}}
optimizer: {{default: {{}}, policy: {{}}}}
data:
  prompts: {{path: {text}/prompts.jsonl}}
  eval_prompts: {{path: {text}/eval_prompts.jsonl}}
  preferences: {{path: {text}/preferences.jsonl}}
  max_length: 48
  prompt_buckets: [16]
batch: {{prompts_per_step: 4, samples_per_prompt: 2, preferences_per_step: 4}}
generate: {{max_new_tokens: 8}}
eval: {{every: 4}}
"""

# what a key can change to, where no rule finds it; None: it can't change alone
OTHER: dict[str, str | None] = {
    "preset": None,  # with what it sets
    **dict.fromkeys(("run_dir", "epochs", "algorithm.name", "mesh.data", "mesh.fsdp", "mesh.tensor"), None),
    "mesh.expert": None,
    "mesh.context": None,
    **dict.fromkeys(("mesh.slices", "mesh.decode", "tokenizer.train_vocab_size", "rewards.arguments"), None),
    **{f"optimizer.{row}.{key}": None for row in ("default", "policy") for key in ("momentum", "newton_schulz_steps")},
    **dict.fromkeys(("rewards.function", "rewards.functions", "algorithm.reward_update"), None),  # with models.reward
    **{f"data.{name}.{key}": None for name in ("prompts", "eval_prompts", "preferences") for key in ("tfds", "hf")},
    **{f"data.{name}.fields": None for name in ("prompts", "eval_prompts", "preferences")},
    **{f"data.{name}.split": '"train[:20]"' for name in ("prompts", "eval_prompts", "preferences")},
    **{f"models.{role}.{key}": None for role in ("policy", "reward", "reference") for key in ("share_trunk",)},
    **{f"models.{role}.trunk_gradient": None for role in ("policy", "reward", "reference")},
    **{  # with experts
        f"models.{role}.{key}": None
        for role in ("policy", "value", "reward", "reference")
        for key in ("router_aux_loss_coef", "router_z_loss_coef", "replay_routing")
    },
    **dict.fromkeys(("models.value.init_from", "models.reference.init_from", "models.value.share_trunk"), None),
    **{f"models.{role}.architecture": None for role in ("policy", "value", "reward", "reference")},
    **{f"models.{role}.adapter": None for role in ("value", "reward", "reference")},  # it does not learn, or is a head
    **{f"models.{role}.base_quantization": None for role in ("policy", "value", "reward", "reference")},  # no adapter
    "models.policy.adapter": "{{rank: 4}}",
    "models.policy.init_from": "{folder}/scalar",
    "models.reward.init_from": "{folder}/lm",
    "tokenizer.init_from": "{folder}/lm",
    "data.prompts.path": "{text}/eval_prompts.jsonl",
    "data.eval_prompts.path": "{text}/prompts.jsonl",
    "data.preferences.path": "{text}/eval_preferences.jsonl",
    "data.demonstrations": "{{path: {text}/demonstrations.jsonl}}",
    "data.unpaired": "{{path: {text}/unpaired.jsonl}}",
    "data.trajectories": "{{path: {text}/trajectories.jsonl}}",
    "data.eval_trajectories": "{{path: {text}/trajectories.jsonl}}",
    "data.eval_demonstrations": "{{path: {text}/eval_demonstrations.jsonl}}",
    "data.eval_preferences": "{{path: {text}/eval_preferences.jsonl}}",
    "data.eval_unpaired": "{{path: {text}/unpaired.jsonl}}",
    "data.cache_dir": "{folder}/cache",
    "data.chat": "{{system: be kind}}",
    "data.prompt_buckets": "[8, 16]",
    "batch.prompts_per_step": "8",
    "batch.preferences_per_step": "8",
    "batch.samples_per_prompt": "4",
    "batch.micro_batch_size": "4",
    "algorithm.num_minibatches": "2",
    "algorithm.dual_clip": "3",
    "batch.max_rollouts": None,  # with grpo
    **dict.fromkeys((f"algorithm.sampler_ratio{end}" for end in ("", "_above", "_floor")), None),  # with a cap
    "generate.beta": None,  # with action values
    "rewards.combine": None,  # with an ensemble
    "rewards.normalize": None,  # with several functions
    "rewards.sample_ahead": None,  # with a function
    **dict.fromkeys(("environment.id", "environment.arguments"), None),  # with models of observations
    **{f"environment.{key}": None for key in ("function", "max_turns", "turn_tokens", "context_widths")},  # together
    "generate.stop": "[film]",
    "alarms.stop": "[kl]",
    "alarms.length": "3",
    "bars": "{{ours: {{metric: eval/score/mean, at_least: 1, source: us}}}}",
    "log.trackers": "[]",
    "log.project": "films",
    "generate.int8": "[weights]",
    "generate.merge_adapter": None,  # with a base_quantization
    "checkpoint.best": "eval/score/mean",
    "eval.judge": "{{path: {text}/labels.jsonl}}",
    "eval.gold": "tests.support.runs:praise",
    "distributed.coordinator": "here:1234",
    "profile": '"3:4"',
}


def other_value(key: str, value: Any, cfg: Config) -> str | None:
    """Another value for the key, as an override has it."""
    section, *inside = key.split(".")
    hint = type_under(type(cfg.algorithm), inside) if section == "algorithm" else type_under(Config, key.split("."))
    inner = bare(hint)
    if get_origin(inner) is Literal:
        return next(choice for choice in get_args(inner) if choice != value)
    if inner is bool:
        return str(not value).lower()
    if inner is int:
        return str((value or 0) + 1)
    assert inner is float, f"{key}: say in OTHER what it can change to"
    return repr(value / 2 if value else 0.25)


class Saved:
    """A run that has come to STEP, as its directory says: its state is that of the start."""

    def __init__(self, folder: Path):
        self.where = {"folder": folder, "text": folder / "text"}
        runs.write_text(folder / "text")
        write_models(folder, folder / "text")
        (folder / "ppo.yaml").write_text(PPO.format(**self.where))
        self.cfg = self.config()
        self.came_to = 0.75  # where its KL controller is
        with self.opened(self.cfg) as run:
            trainer.write_config(run.cfg, "")
            run.save(STEP, initial_state(run.ready).replace(controls={"kl_coef": jnp.float32(self.came_to)}))
        self.keys = flat(read_yaml(dump(run.cfg), "config"))

    def config(self, *overrides: str) -> Config:
        return load(self.where["folder"] / "ppo.yaml", overrides)

    def changed(self, key: str) -> Config | None:
        """The config with another value of one key; None where that can't be."""
        value = OTHER[key] if key in OTHER else other_value(key, self.keys[key], self.cfg)
        return None if value is None else self.config(f"{key}={value.format(**self.where)}")

    @contextlib.contextmanager
    def opened(self, cfg: Config):
        ready = build(resolve_config(cfg))
        nothing = lambda *_: None
        log: Any = SimpleNamespace(say=nothing, flush=nothing, check_owner=nothing)
        log.doing = lambda _: contextlib.nullcontext()
        keep = cfg.checkpoint
        saved = Checkpoints(epath.Path(cfg.run_dir), keep.keep, keep.best, keep.mode, background=False)
        with current(ready.mesh), contextlib.closing(saved):
            yield trainer.Trainer(ready, saved, log, Stop())

    def restored(self, cfg: Config) -> TrainState:
        with self.opened(cfg) as run:
            return run.restore(STEP)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Saved:
    with pytest.MonkeyPatch.context() as patch:
        one_device(patch)
        return Saved(tmp_path_factory.mktemp("resume"))


def one_device(patch: pytest.MonkeyPatch) -> None:
    from jaxrlhf import sharding
    from jaxrlhf.run import build

    patch.setattr(build, "make_mesh", lambda cfg, *_: sharding.make_mesh(cfg, jax.devices()[:1]))


def check_refusal(error: ConfigError, key: str, run_dir: str) -> None:
    """One line: the key, both values, the way out."""
    text = str(error)
    way_out = f"expected the same, or another run_dir (with init_from: {run_dir} it starts from these weights)"
    assert "\n" not in text and text.startswith(key) and text.endswith(way_out), text


def test_every_key_is_told_or_refused(saved):
    """Before anything is built."""
    refused, told = set(), set()
    for key in saved.keys:
        if (cfg := saved.changed(key)) is None:
            continue
        check(cfg, 1)
        try:
            lines = changes_since_saved(saved_run.SavedRuns(), resolve_config(cfg))
        except ConfigError as error:
            check_refusal(error, key, cfg.run_dir)
            refused.add(key)
            continue
        assert lines and all(line.startswith(key) and " -> " in line for line in lines), (key, lines)
        told.add(key)
    assert refused == {
        *("seed", "models.policy.init_from", "models.reward.init_from", "tokenizer.init_from", "precision.params"),
        *("data.chat", "batch.prompts_per_step", "batch.preferences_per_step", "models.policy.adapter"),
        *("optimizer.default.name", "optimizer.policy.name"),
    }
    assert len(told) > 90 and {"algorithm.kl_coef", "iterations", "optimizer.policy.delay", "eval.judge"} <= told
    assert OTHER.keys() - saved.keys.keys() == set(), "keys that are gone"


RESTORED = ["algorithm.kl_coef", "optimizer.default.dtype", "data.prompts.path"]  # with every other key each night


@pytest.mark.parametrize("keys", [RESTORED, pytest.param(None, marks=pytest.mark.nightly)], ids=["some", "all"])
def test_what_is_told_can_be_restored_or_is_refused_then(saved, monkeypatch, keys):
    one_device(monkeypatch)
    refused = set()
    for key in keys or saved.keys:
        cfg = saved.changed(key)
        with contextlib.suppress(ConfigError):
            if cfg is None or not changes_since_saved(saved_run.SavedRuns(), resolve_config(cfg)):
                continue
            try:
                state = saved.restored(cfg)
            except ConfigError as error:
                check_refusal(error, key, cfg.run_dir)
                refused.add(key)
                continue
            assert int(state.step) == 0 and state.params.keys() == {"policy", "value", "reward"}
    # the statistics of the last updates are a part of the state, where there are any
    spikes = {key for key in ("optimizer.default.spike_sigmas", "optimizer.policy.spike_sigmas") if not keys}
    assert {key for key in refused if not key.startswith("data.")} == spikes
    assert "data.prompts.path" in refused


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([], 0.75),
        (["algorithm.kl_target=3"], 0.75),
        (["algorithm.kl_coef=0.25"], 0.25),  # its own first value
        (["algorithm.kl_controller=fixed"], 0.05),
        (["algorithm.kl_controller=fixed", "algorithm.kl_coef=0.1"], 0.1),
    ],
    ids=str,
)
def test_a_kl_coefficient_that_the_config_changes_is_taken(saved, monkeypatch, changes, expected):
    """It is told as changed, so that what the checkpoint holds must not win over it."""
    from jaxrlhf.algorithms import ppo

    one_device(monkeypatch)
    cfg = saved.config(*changes)
    np.testing.assert_allclose(ppo.kl_coef(saved.restored(cfg), cfg.algorithm), expected, rtol=1e-6)


# ---- one resolution -------------------------------------------------------------------------------------------------


class Reached(Exception):
    """A start has come to its compilation."""


def calls_of_start(patch: pytest.MonkeyPatch, start: Callable[[], Any]) -> collections.Counter[str]:
    """How often a start, up to its compilation, looks for its algorithm, and asks that about the config."""
    calls: collections.Counter[str] = collections.Counter()

    def counting(name: str, function: Callable) -> Callable:
        def call(*given: Any) -> Any:
            calls[name] += 1
            return function(*given)

        return call

    def stop(self: Any, state: TrainState) -> None:
        raise Reached

    parts = {part: counting(part, getattr(ALGORITHMS["ppo"], part)) for part in ("roles", "batch", "updates")}
    patch.setitem(ALGORITHMS, "ppo", ALGORITHMS["ppo"]._replace(**parts))
    patch.setattr(roles, "find", counting("find", roles.find))
    patch.setattr(trainer.Trainer, "compile", stop)
    with pytest.raises(Reached):
        start()
    return calls


@pytest.mark.parametrize("resumed, read", [(False, 1), (True, 4)])
def test_a_start_resolves_its_config_once(saved, monkeypatch, tmp_path, resumed, read):
    """``read``: configs that are read from text, whose algorithm names their fields: the run's own; resumed, as the
    checkpoint has them: twice to compare (one of them its own again), and once for what the KL controller began with.
    """
    one_device(monkeypatch)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    if resumed:
        runs.copy_run(Path(saved.cfg.run_dir), tmp_path / "run", STEP)
    start = lambda: trainer.run(saved.config(f"run_dir={tmp_path}/run", "log.trackers=[]"))
    calls = calls_of_start(monkeypatch, start)
    assert calls["batch"] == calls["updates"] == 1
    assert 1 < calls["find"] <= read + 1 and 1 < calls["roles"] <= read + 1


# ---- signals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("best", [False, True])
def test_a_signal_in_an_evaluation_saves_at_once(saved, monkeypatch, tmp_path, best):
    """And not at its end, which may come after that of the machine. What is best is known nevertheless."""
    one_device(monkeypatch)
    count_steps(monkeypatch)
    kept = lambda: max(committed(run_dir), default=None)
    found: list[int | None] = []
    run_dir = tmp_path / "run"

    def evaluate(self, state, between):
        between()
        found.append(kept())
        if int(state.step) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            between()
            for _ in range(500):  # it is written in the background
                if kept() == 2:
                    break
                time.sleep(0.02)
            found.append(kept())
            between()
        return Result({"score/mean": 1.0}, [])

    monkeypatch.setattr(HeldOut, "run", evaluate)
    more = ["batch.prompts_per_step=8", "batch.preferences_per_step=8"]  # there are 8 devices
    more += ["checkpoint.best=eval/score/mean"] if best else []
    cfg = saved.config(f"run_dir={run_dir}", "eval.every=2", "log.trackers=[]", *more)
    assert trainer.run(cfg) == "preempted"
    assert found == [None, None, 2] and runs.steps_kept(run_dir) == [2]
    assert [row["step"] for row in runs.rows(run_dir) if "eval/score/mean" in row] == [0, 2]
    with contextlib.closing(Checkpoints(run_dir, best="eval/score/mean")) as there:
        assert there.best_step() == (2 if best else None)


def test_an_evaluation_looks_for_signals_before_each_batch(saved, monkeypatch):
    one_device(monkeypatch)
    with saved.opened(saved.config("eval.size=16")) as run:
        policy = run.evaluation.policy
        calls: list[str] = []
        monkeypatch.setattr(policy, "program", lambda *_: calls.append("batch") or pytest.fail("no more of it"))
        with pytest.raises(pytest.fail.Exception):
            policy.write(initial_state(run.ready), lambda: calls.append("between"))
    assert calls == ["between", "batch"]
