"""`jaxrlhf train CONFIG --check`: what is shown of a run without training it, and that nothing is written."""

import math

import jax
import numpy as np
import pytest

from jaxrlhf.algorithms import ALGORITHMS
from jaxrlhf.cli import discover
from jaxrlhf.config.load import dump, load
from jaxrlhf.config.resolved import resolve_config
from jaxrlhf.data.encode import Encoded
from jaxrlhf.data.tokenizer import train_bpe
from jaxrlhf.errors import ConfigError
from jaxrlhf.models.parameters import parameter_table
from jaxrlhf.plan import device_memory, dry_run
from jaxrlhf.run.build import build
from jaxrlhf.tpu.peaks import GIB
from tests.support import runs
from tests.test_minimal import fill_in, write_models


@pytest.fixture(scope="module")
def models(root, tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"), runs.text(root))


@pytest.fixture
def checked(root, tmp_path, models, one_device):
    """(what is told of the starter config of a method, filled in, its config); nothing may be written."""

    def call(method, *more):
        path = tmp_path / f"{method}.yaml"
        path.write_text(fill_in(discover.starters()[method].read_text(), tmp_path / "runs", runs.text(root), models))
        cfg = load(path, more)
        lines = list(dry_run.dry_run([(str(path), cfg)]))
        assert not (tmp_path / "runs").exists()
        return "\n".join(lines), cfg

    return call


READ = {"sft": "demonstrations", "rm": "preferences", "dpo": "preferences", "ppo": "prompts", "grpo": "prompts"}
READ |= {"ppo_lagrangian": "prompts", "raft": "prompts", "online_dpo": "prompts", "kto": "unpaired", "cm": "unpaired"}
READ |= {"distill": "prompts", "distill_data": "demonstrations"}
READ |= dict.fromkeys(("simpo", "orpo", "rm_ties"), "preferences")
READ |= dict.fromkeys(("ilql", "fqi", "mc_returns", "bc", "rm_ratings"), "trajectories")


@pytest.mark.parametrize("method", sorted(ALGORITHMS))
def test_a_starter_config_is_checked_without_training_or_writing(method, checked, tmp_path):
    told, cfg = checked(method)
    where = f"data.{READ[method]}"
    kept = 20 if method == "bc" else 200  # data.keep_top
    assert f"{where}: 200 read, {kept} kept" in told and told.count(f"{where}, row 1") == told.count(f"{where}, row 3")
    assert "memory, counted and not compiled: " in told and " of the machine" in told
    (tmp_path / "again.yaml").write_text(told.split("\n", 1)[1].partition(f"\n{cfg.run_dir}: ")[0])
    assert load(tmp_path / "again.yaml") == cfg  # what is shown of the config is all of it
    if method in ("rm", "dpo"):
        assert told.count("{+") == told.count("+}") == 6  # three pairs
        assert ", row 1, chosen: " in told and ", row 3, rejected: " in told
    if method in ("ppo", "grpo"):
        assert "{+" not in told and told.count("the responses to it are learned") == 3


def test_steps_of_an_epoch(checked):
    """By hand: 200 pairs, 32 an iteration."""
    told, _ = checked("dpo")
    assert "an epoch: 200 rows of data.preferences / 32 an iteration = 6.25 iterations" in told
    assert "7 iterations of 32 preferences = 1.12 epochs of data.preferences (200 rows)" in told


def test_memory_is_counted_for_the_devices_here(checked, root, tmp_path, monkeypatch):
    """Weights and Adam's moments exactly: 12 bytes a weight of the policy, 4 of the reference."""
    told, cfg = checked("dpo")
    ready = build(resolve_config(cfg), keep=False)
    leaves = jax.tree.leaves(parameter_table(ready.configs["policy"], "lm"), is_leaf=lambda x: hasattr(x, "init"))
    bytes_ = 16 * sum(math.prod(leaf.shape) for leaf in leaves)
    assert f"({bytes_ / GIB:.2f} weights and moments, " in told
    monkeypatch.setattr(dry_run, "room_of", lambda device: device_memory.Room(100, False, "of a toy"))
    assert "; MORE THAN THERE IS: of 0.0 GiB of a toy" in dry_run.describe_memory(ready)
    monkeypatch.setattr(dry_run, "room_of", lambda device: None)
    assert dry_run.describe_memory(ready).endswith("; these devices do not tell what they have")


def test_what_training_would_refuse_is_refused(checked, tmp_path):
    with pytest.raises(ValueError, match=r"data\.preferences: none of its 200 rows is left"):
        checked("dpo", "data.max_length=2")
    with pytest.raises(ConfigError, match=r"models\.policy\.init_from"):
        checked("dpo", f"models.policy.init_from={tmp_path}/nowhere")


def test_a_run_that_starts_from_one_before_it_is_told(checked, tmp_path, root, models):
    _, first = checked("sft")
    (tmp_path / "two.yaml").write_text(dump(first))
    second = load(tmp_path / "two.yaml", [f"run_dir={tmp_path}/two", f"models.policy.init_from={first.run_dir}"])
    *_, last = dry_run.dry_run([("one.yaml", first), ("two.yaml", second)])
    assert last == f"two.yaml: starts from {first.run_dir}, which one.yaml makes first: its data are not looked at"


# ---- marks ----------------------------------------------------------------------------------------------------------

LETTERS = train_bpe(["a"], 259)


def row(text: str, learned: str) -> Encoded:
    """One token a letter; ``learned``: + below each that is learned."""
    return Encoded(
        np.asarray(LETTERS.encode(text, add_special_tokens=False), np.int32), np.array([c == "+" for c in learned])
    )


@pytest.mark.parametrize(
    "text, learned, shown",
    [
        ("question answer", "         ++++++", "question {+answer+}"),
        ("q a q b", "  +   +", "q {+a+} q {+b+}"),
        ("q\na\\b", "  +++", "q\\n{+a\\\\b+}"),
        ("prompt", "      ", "prompt"),
        ("all", "+++", "{+all+}"),
    ],
)
def test_what_is_learned_is_marked(text, learned, shown):
    assert dry_run.marked(LETTERS, row(text, learned)) == shown


def test_special_tokens_are_shown_and_long_texts_cut():
    side = Encoded(
        np.array([LETTERS.bos_token_id, *LETTERS.encode("a", add_special_tokens=False)]), np.array([False, True])
    )
    assert dry_run.marked(LETTERS, side) == "<bos>{+a+}"
    cut = dry_run.shortened("a" * 1000)
    assert cut == "a" * 200 + " [... 600 letters ...] " + "a" * 200
