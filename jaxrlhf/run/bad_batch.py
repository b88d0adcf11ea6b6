"""After the step skipped an update that was not finite: report it, dump its batch, and decide when the run stops."""

import io
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from jaxrlhf.config.record import Config
from jaxrlhf.errors import one_line
from jaxrlhf.hosts import processes


class NotFinite:
    """What happens after such an update: Config.on_nonfinite."""

    def __init__(self, cfg: Config, say: Callable[[str], None]):
        self.cfg, self.say, self.row = cfg, say, 0  # row: iterations with such updates, one after the other

    def check(self, step: int, numbers: dict[str, float], rows: Callable[[], Any], kept: int | None) -> None:
        """``rows``: what the iteration was given and what it sampled, as trees of arrays; called where it is dumped.
        ``kept``: the last step that was saved.

        Raises:
            FloatingPointError: by on_nonfinite: stop, or skip and max_nonfinite; the parameters are as before.
        """
        vital = [name for name in numbers if name.startswith("loss/") or name.endswith("/grad_norm")]
        bad = [f"{name} is {numbers[name]}" for name in vital if not math.isfinite(numbers[name])]
        share = numbers.get("update/not_finite", 0.0)
        if not bad and not share:
            self.row = 0
            return
        self.row += 1
        what = f"step {step}: {bad[0] if bad else 'a new parameter is not finite'}"
        file = self.dump(step, rows())
        if self.cfg.on_nonfinite == "skip" and self.row < self.cfg.max_nonfinite:
            self.say(f"warning: {what}: {share:.0%} of its updates left out; the batch: {file}")
            return
        again = (
            f"{self.row} steps in a row (max_nonfinite)"
            if self.cfg.on_nonfinite == "skip"
            else "the same command comes to it again, with on_nonfinite=skip it goes on without the update"
        )
        raise FloatingPointError(f"{what}; last good checkpoint: step {kept}; the batch: {file}; {again}")

    def dump(self, step: int, rows: Any) -> str:
        """Writes the rows as NumPy arrays under their paths, and gives the file, or why there is none: a full disk must
        not hide the loss. From the last checkpoint, the same command up to this step makes the rows again."""
        own = f".{jax.process_index()}" if processes.several() else ""
        file = epath.Path(self.cfg.run_dir) / f"bad_batch_{step}{own}.npz"
        arrays = {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(rows)}
        whole = io.BytesIO()
        np.savez(whole, **arrays)  # pyright: ignore[reportArgumentType]
        try:
            file.write_bytes(whole.getvalue())
        except OSError as error:
            return f"not written ({one_line(error)})"
        return str(file)
