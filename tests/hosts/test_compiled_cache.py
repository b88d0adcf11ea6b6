"""The cache of compiled programs: damaged entries are noticed, said in a line, and made again."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import compilation_cache as of_jax
from jax._src.lru_cache import LRUCache

from jaxrlhf.hosts.compiled_cache import Verified, verify_entries
from tests.support.disk import full_disk


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """In the place of the suite's; all programs go there."""
    before = jax.config.values["jax_persistent_cache_min_compile_time_secs"]
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    verified = Verified(LRUCache(str(tmp_path), max_size=-1))
    monkeypatch.setattr(of_jax, "_cache", verified)
    monkeypatch.setattr(of_jax, "_cache_initialized", True)
    yield verified
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


def doubled(x):
    return 2 * x + 1


def run() -> np.ndarray:
    """A program that is compiled anew, or taken from the cache."""
    jax.clear_caches()
    return np.asarray(jax.jit(doubled)(jnp.arange(3.0)))


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_program_is_compiled_again(cache, tmp_path, capfd, damage):
    np.testing.assert_array_equal(run(), [1, 3, 5])
    (file,) = tmp_path.glob("jit_doubled-*-sha256-cache")
    whole = file.read_bytes()
    wrong = bytearray(whole)
    if damage == "flip":
        wrong[random.Random(1).randrange(len(wrong))] ^= 8
    else:
        del wrong[len(wrong) // 2 if damage == "cut" else 0 :]
    file.write_bytes(wrong)
    np.testing.assert_array_equal(run(), [1, 3, 5])
    _, errors = capfd.readouterr()
    assert errors == f"{tmp_path}: the compiled program jit_doubled is damaged: it is compiled again\n"
    assert cache.get(file.name.removesuffix("-sha256-cache"))  # made again
    run()
    assert capfd.readouterr().err == ""


def test_every_flip_and_every_cut_is_noticed(cache, tmp_path):
    draw = random.Random(0)
    for number in range(100):
        cache.put("p-0", bytes(range(100)))
        assert cache.get("p-0") == bytes(range(100))
        (file,) = tmp_path.glob("*")
        content = bytearray(file.read_bytes())
        if number % 2:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        else:
            del content[draw.randrange(len(content)) :]
        file.write_bytes(content)
        assert cache.get("p-0") is None and not [*tmp_path.iterdir()]


def test_an_entry_that_a_full_disk_refuses_leaves_nothing(cache, tmp_path):
    with full_disk(50), pytest.raises(OSError):
        cache.put("p-0", b"x" * 100)
    assert cache.get("p-0") is None and not [*tmp_path.iterdir()]


def test_entries_of_other_programs_are_left_alone(cache, tmp_path):
    cache.cache.put("p-0", b"theirs")
    assert cache.get("p-0") is None
    cache.put("p-0", b"ours")
    assert cache.get("p-0") == b"ours" and cache.cache.get("p-0") == b"theirs"


def test_a_cache_that_evicts_keeps_account(tmp_path):
    cache = Verified(LRUCache(str(tmp_path), max_size=300))
    for number in range(4):
        cache.put(f"p-{number}", b"x" * 100)
    assert [number for number in range(4) if cache.get(f"p-{number}")] == [2, 3]


def test_the_cache_of_this_jax_is_verified(cache, monkeypatch, capfd):
    monkeypatch.setattr(of_jax, "_cache", cache.cache)
    verify_entries()
    verify_entries()
    assert isinstance(of_jax._cache, Verified) and of_jax._cache.cache is cache.cache
    monkeypatch.delattr(of_jax, "_initialize_cache")
    verify_entries()
    assert "can't be verified" in capfd.readouterr().err
