"""Checkpoints through orbax: the whole state of a run, asynchronously, a directory a step.

Each role is an item of its own, so that another run can take one role and read nothing else.
"""

import contextlib
import math
import re
from collections.abc import Iterator
from typing import Any

import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from jaxrlhf.errors import one_line
from jaxrlhf.run.saved_run import EXTRA, directory, latest_step
from jaxrlhf.types import TrainState

STATE = "state"  # an item beside the roles', as EXTRA is


class Checkpoints:
    """The checkpoints of one run directory: the last ``keep``, and the best by ``best`` (a name in save's metrics).

    ``read_only``: for other processes than the one that trains, whose unfinished checkpoints are then left alone.
    ``background``: a save goes on after it was called, from a copy of the state in host memory."""

    def __init__(
        self,
        run_dir,
        keep: int = 2,
        best: str | None = None,
        mode: str = "max",
        read_only: bool = False,
        background: bool = True,
    ):
        policies: list = [preservation_policy.LatestN(keep)]
        # a checkpoint that an earlier config measured otherwise is no candidate
        of = lambda metrics: metrics.get(best, math.inf if mode == "min" else -math.inf)
        if best:
            rules = {"get_metric_fn": of, "reverse": mode == "min", "keep_checkpoints_without_metrics": False}
            policies.append(preservation_policy.BestN(n=1, **rules))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
            best_fn=of if best else None,  # without it orbax writes no metrics, and a resumed run forgets its best
            best_mode=mode,
            cleanup_tmp_directories=not read_only,  # what a crash left half-written
            read_only=read_only,
            enable_async_checkpointing=background,
        )
        self.best, self.mode = best, mode
        self.manager = ocp.CheckpointManager(directory(run_dir), options=options)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Raises OSError, in one line, where the block, or what it waits for, can't write: a full disk, say."""
        try:
            yield
        except Exception as error:  # tensorstore has ValueErrors of many lines
            run_dir = epath.Path(self.manager.directory).parent
            system = re.findall(r": ([^:\[]+) \[os_error_code", str(error))
            why = system[-1] if system else getattr(error, "strerror", None) or one_line(error)[:200]
            kept = latest_step(run_dir)
            then = "the same command starts again" if kept is None else f"the same command goes on from step {kept}"
            raise OSError(f"{run_dir}: a checkpoint could not be written: {why}; once it can be, {then}") from error

    def save(self, step: int, state: TrainState, extra: dict, metrics: dict[str, float] | None = None) -> None:
        """Start to write; returns once the arrays may be donated. ``extra`` is JSON: config, models, data iterators.

        A step that is there already, saved before it was measured, is written anew only for what makes it the best."""
        items: dict[str, Any] = {item: ocp.args.StandardSave(tree) for item, tree in parts(state).items()}
        items[EXTRA] = ocp.args.JsonSave(extra)
        value = (metrics or {}).get(self.best, math.nan) if self.best else math.nan
        known = None if math.isnan(value) else {self.best: value}
        with self.writing():
            if step == self.manager.latest_step():
                if known is None:
                    return
                self.manager.wait_until_finished()
                self.manager.delete(step)
            self.manager.save(step, args=ocp.args.Composite(**items), metrics=known, force=True)

    def latest(self) -> int | None:
        """The newest step that is whole, or None."""
        return self.manager.latest_step()

    def best_step(self) -> int | None:
        """The step that is best by ``best``; None where nothing is, or none was measured."""
        with self.writing():
            self.manager.wait_until_finished()
        return self.manager.best_step() if self.best else None

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state of ``step``, laid out as ``abstract`` says: on another mesh than it was saved from, if need be.

        Raises ValueError, in one line, where other roles learned, or other ones did not."""
        items = {item: ocp.args.StandardRestore(tree) for item, tree in parts(abstract).items()}
        there = {path.name for path in (epath.Path(self.manager.directory) / str(step)).iterdir()}
        if missing := sorted(items.keys() - there):
            held = ", ".join(sorted(name for name in there if name.startswith(("params.", "slow."))))
            raise ValueError(
                f"{self.manager.directory}: step {step} has no {missing[0]}, as the config wants; it has {held}"
            )
        found = self.manager.restore(step, args=ocp.args.Composite(**items))
        return assemble(abstract, found)

    def extra(self, step: int) -> dict:
        """The JSON saved with ``step``."""
        return self.manager.restore(step, args=ocp.args.Composite(**{EXTRA: ocp.args.JsonRestore()}))[EXTRA]

    def close(self) -> None:
        """Wait until everything is on disk."""
        with self.writing():
            self.manager.wait_until_finished()
        self.manager.close()


def parts(state: TrainState) -> dict[str, Any]:
    """The state as items: one a role, and the rest."""
    rest = {"step": state.step, "seed": state.seed, "opt_state": state.opt_state, "controls": state.controls}
    if not state.controls:
        del rest["controls"]
    roles = {f"{kind}.{role}": tree for kind in ("params", "slow") for role, tree in getattr(state, kind).items()}
    return roles | {STATE: rest}


def assemble(abstract: TrainState, items) -> TrainState:
    """The inverse of ``parts``, with the roles of ``abstract``."""
    rest = items[STATE]
    return TrainState(
        step=rest["step"],
        seed=rest["seed"],
        params={role: items[f"params.{role}"] for role in abstract.params},
        slow={role: items[f"slow.{role}"] for role in abstract.slow},
        opt_state=rest["opt_state"],
        controls=rest.get("controls", {}),
    )
