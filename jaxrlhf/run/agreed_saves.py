"""The barriers of a save that several processes write in the background: where one of them fails, all learn of it.

Orbax has a process that fails leave the save, while the others wait for it at a barrier, for 20 minutes. Here it comes
to that barrier all the same, and says that it failed; the others then fail too, and all go on together.
"""

from typing import Any

import jax
import orbax.checkpoint as ocp

KINDS = ("async_write_complete", "async_commit_complete")  # in orbax's keys, in this order
OPENS = "set_value_start"  # in the key of the barrier as a save begins, and again as it ends, failed or not


class AgreedBarriers:
    """Orbax's ``barrier_sync_fn``, called in the same order by all processes that do not fail."""

    def __init__(self, client: Any, process: int):
        self.client, self.process = client, process  # JAX's client of the coordination service
        self.saves = 0  # begun so far: their barriers have names of their own
        self.under_way = False
        self.left: list[str] = []  # of KINDS: to come in the save that is under way

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        kind = next((kind for kind in KINDS if kind in key), None)
        if kind:
            self.meet(kind, timeout_ms)
            return
        if OPENS in key:
            self.under_way = not self.under_way
            if self.under_way:
                self.saves, self.left = self.saves + 1, [*KINDS]
            elif self.left:  # it failed before this barrier
                self.fail(self.left[0], timeout_ms)
        self.client.wait_at_barrier(key, timeout_ms)

    def name(self, kind: str) -> str:
        return f"jaxrlhf/save/{self.saves}/{kind}"

    def meet(self, kind: str, timeout_ms: int) -> None:
        """The barrier. Raises OSError where a process says there that it failed."""
        self.left = [other for other in self.left if other != kind]
        self.client.wait_at_barrier(self.name(kind), timeout_ms)
        if failed := self.client.key_value_dir_get(f"{self.name(kind)}/failed/"):
            self.left = []  # all know of it
            raise OSError(f"process {failed[0][1]} could not write its part")

    def fail(self, kind: str, timeout_ms: int) -> None:
        self.left = []
        self.client.key_value_set(f"{self.name(kind)}/failed/{self.process}", str(self.process))
        self.client.wait_at_barrier(self.name(kind), timeout_ms)


def agreed_barriers() -> AgreedBarriers:
    """Those of this process."""
    return AgreedBarriers(ocp.multihost.get_jax_distributed_client(), jax.process_index())
