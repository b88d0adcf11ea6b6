"""Processes whose saves fail at one barrier or another learn of it together, and the next save is like the first."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxrlhf.run.agreed_saves import KINDS, AgreedBarriers

BEGIN = ("Holder:set_value_start", "Holder:set_value_end")


class Service:
    """What JAX's client does for two processes, which are threads here."""

    def __init__(self):
        self.values: dict[str, str] = {}
        self.barriers: dict[str, threading.Barrier] = {}
        self.lock = threading.Lock()

    def wait_at_barrier(self, key: str, timeout_ms: int) -> None:
        with self.lock:
            barrier = self.barriers.setdefault(key, threading.Barrier(2))
        barrier.wait(timeout_ms / 1000)

    def key_value_set(self, key: str, value: str) -> None:
        self.values[key] = value

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        return [(name, value) for name, value in self.values.items() if name.startswith(key)]


def save(barriers: AgreedBarriers, fails_at: str | None) -> str:
    """What orbax does with the barriers in a save; what went wrong. It fails before the barrier ``fails_at``."""
    for key in BEGIN:
        barriers(key=key, timeout_ms=5000)
    wrong = ""
    for kind in KINDS:
        if kind == fails_at:
            wrong = "File too large"
            break
        try:
            barriers(key=f"{kind}.4.orbax-checkpoint-tmp", timeout_ms=5000)
        except OSError as error:
            wrong = str(error)
            break
    for key in BEGIN:  # at the end too, whatever happened
        barriers(key=key, timeout_ms=5000)
    return wrong


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("process", [0, 1])
def test_where_one_process_fails_the_other_learns_of_it_at_once(kind, process):
    service = Service()
    pair = [AgreedBarriers(service, number) for number in range(2)]
    fails = [kind if number == process else None for number in range(2)]
    with ThreadPoolExecutor(2) as pool:
        told = f"process {process} could not write its part"
        expected = [told, told]
        expected[process] = "File too large"
        assert list(pool.map(save, pair, fails)) == expected
        assert list(pool.map(save, pair, [kind, kind])) == ["File too large"] * 2
        assert list(pool.map(save, pair, [None, None])) == ["", ""]


def test_without_them_the_other_process_waits():
    """So that the test above tests something: a plain barrier."""
    with pytest.raises(threading.BrokenBarrierError):
        Service().wait_at_barrier(KINDS[0], 100)
