"""What can never fit into memory is refused before anything is made."""

import contextlib
import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxrlhf.config.batch import divisors
from jaxrlhf.config.load import load
from jaxrlhf.config.resolved import resolve_config
from jaxrlhf.errors import ConfigError
from jaxrlhf.plan import device_memory
from jaxrlhf.run.build import build
from jaxrlhf.run.initial_state import abstract_state
from jaxrlhf.sharding import current

SFT = """run_dir: {folder}/run
iterations: 2
algorithm: {{name: sft}}
tokenizer: {{train_vocab_size: 300}}
models:
  policy:
    architecture: {{vocab_size: 300, hidden_size: 16, num_layers: 1, num_heads: 2, mlp_size: 16, max_positions: 64}}
data: {{demonstrations: {{path: {folder}/a.jsonl}}, max_length: 16, cache_dir: {folder}/cache}}
batch: {{sequences_per_step: 8}}
"""


@pytest.fixture
def written(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one two three"}\n' * 8)
    (tmp_path / "sft.yaml").write_text(SFT.format(folder=tmp_path))
    return tmp_path / "sft.yaml"


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("models.policy.architecture.hidden_size=1000000000", "models.policy: weights and moments of the run alone"),
        ("models.policy.architecture.vocab_size=1000000000", "models.policy: weights and moments of the run alone"),
        ("models.policy.architecture.num_layers=2000000000", "models.policy: weights and moments of the run alone"),
        ("batch.sequences_per_step=2000000000", "batch: the token ids of a batch alone"),
    ],
)
def test_sizes_beyond_memory_are_one_line(command, written, key, words):
    out, err = command("train", written, key, "batch.micro_batch_size=null", code=2)
    assert out == "" and err.startswith(words) and err.count("\n") == 1
    assert err.endswith(" of the machine; expected smaller sizes, or more devices\n")
    assert not (written.parent / "run" / "config.yaml").exists()


def test_a_check_refuses_a_batch_beyond_memory_too(command, written):
    """A model may be meant for other devices; a batch is made here."""
    _, err = command("train", "--check", written, "batch.sequences_per_step=2000000000", code=2)
    assert err.startswith("batch: the token ids of a batch alone are")


def test_what_fits_exactly_is_let_through(written, monkeypatch):
    ready = build(resolve_config(load(written)), keep=False)
    with current(ready.mesh):
        need = device_memory.bytes_on_device(abstract_state(ready)) * jax.device_count()
    for spare, refused in ((0, False), (-1, True)):
        monkeypatch.setattr(
            device_memory, "room_of", lambda device, spare=spare: device_memory.Room(need + spare, True, "of a toy")
        )
        try:
            device_memory.need_room(ready)
        except ConfigError:
            assert refused
        else:
            assert not refused


def test_devices_of_other_processes_are_not_asked(written, monkeypatch):
    """Their memory is not here; of CPUs each machine holds the parts of its own devices alone."""
    ready = build(resolve_config(load(written)), keep=False)
    with current(ready.mesh):
        need = device_memory.bytes_on_device(abstract_state(ready))
    asked = []
    fake = [SimpleNamespace(process_index=process) for process in (1, 1, 0, 0)]
    elsewhere = dataclasses.replace(ready, mesh=SimpleNamespace(devices=np.array(fake)))
    for spare, refused in ((0, False), (-1, True)):
        monkeypatch.setattr(
            device_memory,
            "room_of",
            lambda device, spare=spare: asked.append(device) or device_memory.Room(2 * need + spare, True, ""),
        )
        with pytest.raises(ConfigError) if refused else contextlib.nullcontext():
            device_memory.refuse(elsewhere, "models.policy", "weights", need)
    assert asked == [fake[2]] * 2


def test_divisors_of_a_large_number_are_found_at_once():
    assert divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36] and divisors(1) == [1] and divisors(13) == [1, 13]
    assert divisors(2_000_000_000)[-2:] == [1_000_000_000, 2_000_000_000]
