"""Checkpoints through orbax: the whole state of a run, asynchronously, a directory per step, with a manifest each.

Each role is an item of its own, so that another run can take one role and read nothing else.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import math
import platform
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from jaxrlhf import __version__
from jaxrlhf.errors import one_line
from jaxrlhf.hosts import processes
from jaxrlhf.log.rows import replace_text
from jaxrlhf.log.run_dir import is_local
from jaxrlhf.models.lora import bases_in
from jaxrlhf.run import failed_save_logs, manifest
from jaxrlhf.run import verified_steps as steps
from jaxrlhf.run.agreed_saves import agreed_barriers
from jaxrlhf.run.saved_run import EXTRA, best_of, measured
from jaxrlhf.types import TrainState

STATE = "state"  # an item beside the roles', as EXTRA is
GIVE_UP = 3  # saves in a row that can't be written end the run
METRICS = "metrics"  # orbax's item of what a step was measured as


class Checkpoints:
    """The checkpoints of one run directory, which one run writes: the last ``keep``, the best by ``best`` (a name in
    save's metrics), and always the last one that has its manifests.

    ``background``: a save goes on after it was called, from a copy of the state in host memory; the manifest is made in
    the background in any case. Only what goes on in the background deletes checkpoints, and none that is being read."""

    def __init__(self, run_dir, keep: int = 2, best: str | None = None, mode: str = "max", background: bool = True):
        self.run_dir, self.keep, self.best, self.mode = epath.Path(run_dir), keep, best, mode
        failed_save_logs.silence()
        self.background, self.barriers = background, agreed_barriers() if processes.several() else None
        self.littered = False  # whether a save has failed: what is left of it may come back while it is written
        self.manager = self.open_manager()
        self.sealing: threading.Thread | None = None
        self.failed: Exception | None = None  # why a manifest could not be written
        self.failures = 0  # saves in a row that could not be written
        self.broken = False  # whether orbax still holds the error of a failed save, and would raise it in the next
        self.lost = False  # whether another process writes them by now: nothing is deleted any more

    def open_manager(self) -> ocp.CheckpointManager:
        """Orbax's part of this."""
        # a checkpoint that an earlier config measured otherwise is no candidate
        of = lambda metrics: metrics.get(self.best, math.inf if self.mode == "min" else -math.inf)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.PreserveAll(),  # ``prune`` deletes, once a manifest is written
            best_fn=of if self.best else None,  # without it orbax writes no metrics
            best_mode=self.mode,
            cleanup_tmp_directories=not self.littered,  # of a crash; ``sweep`` is for those of failed saves
            enable_async_checkpointing=self.background,
            async_options=ocp.AsyncOptions(barrier_sync_fn=self.barriers) if self.barriers else None,
        )
        return ocp.CheckpointManager(steps.directory(self.run_dir), options=options)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Raises OSError, in one line, where the block, or what it waits for, can't write: a full disk, say."""
        try:
            yield
        except Exception as error:  # tensorstore has ValueErrors of many lines
            system = re.findall(r": ([^:\[]+) \[os_error_code", str(error))
            why = system[-1] if system else getattr(error, "strerror", None) or one_line(error)[:200]
            kept = steps.last_committed(self.run_dir)
            then = "the same command starts again" if kept is None else f"the same command goes on from step {kept}"
            raise OSError(
                f"{self.run_dir}: a checkpoint could not be written: {why}; once it can be, {then}"
            ) from error

    def save(
        self,
        step: int,
        state: TrainState,
        extra: dict,
        metrics: dict[str, float] | None = None,
        first: Callable[[], None] = lambda: None,
    ) -> str | None:
        """Start to write; returns once the arrays may be donated. ``extra`` is JSON: config, models, data iterators.

        ``first`` writes what must not be newer than the last checkpoint; where it raises OSError, nothing is saved.
        A step that is there already, saved before it was measured, is only given what it was measured as. Where this
        save, or the one before it, could not be written, the line that says so is returned, and the next save is the
        next try. Several processes agree on it. Raises OSError after GIVE_UP of them in a row, and at once where some
        of several processes may wait for the one that fails: in a save that isn't in the background."""
        line = self.attempt(self.wait_for_files)
        if failed := self.attempt(first):
            return failed
        return self.attempt(lambda: self.start(step, state, extra, metrics), apart=False) or line

    def check_owner(self, check: Callable[[], None]) -> None:
        """Calls ``check``, which raises ValueError where another process writes the run directory by now: from then on
        no checkpoint is deleted."""
        try:
            processes.on_main(check)
        except ValueError:
            self.lost = True
            raise

    def attempt(self, work: Callable[[], None], apart: bool = True) -> str | None:
        """Why ``work``, a save or what remains of it, could not be written; None where it could. Raises as ``save``.

        ``apart``: no process waits in it for one that fails, so that they can agree on it."""
        failed: OSError | None = None
        try:
            with self.writing():
                work()
        except OSError as error:
            failed = error
            if processes.several() and not apart:
                raise
        told = str(failed or "")
        told = processes.first_told(told) if apart else told
        if not told:
            return None
        self.failures, self.broken, self.littered = self.failures + 1, True, True
        if self.sealing:
            self.sealing.join()
        if processes.is_main():
            self.sweep()
        if self.failures >= GIVE_UP:
            raise failed or OSError(told)
        return f"{told}; training goes on, and the next save is another try ({self.failures} of {GIVE_UP} failed)"

    def sweep(self) -> None:
        """Delete what failed saves left half-written, which takes room. Where orbax still writes to it, it stays for
        the next call, or the next start."""
        for path in steps.directory(self.run_dir).glob("*.orbax-checkpoint-tmp*"):
            with contextlib.suppress(OSError):
                path.rmtree()

    def start(self, step: int, state: TrainState, extra: dict, metrics: dict[str, float] | None) -> None:
        """``save``, whose errors go through."""
        items: dict[str, Any] = {item: ocp.args.StandardSave(tree) for item, tree in parts(state).items()}
        items[EXTRA] = ocp.args.JsonSave(extra)
        value = (metrics or {}).get(self.best, math.nan) if self.best else math.nan
        known = None if math.isnan(value) else {self.best: value}
        about = describe(step, state, extra)
        if self.littered and processes.is_main():
            self.sweep()
        if self.broken:
            with contextlib.suppress(Exception):  # told before
                self.manager.close()
            self.manager, self.broken = self.open_manager(), False
        if step != self.manager.latest_step():
            save_bases(self.run_dir, state)
            self.manager.save(step, args=ocp.args.Composite(**items), metrics=known, force=True)
        elif known is not None:
            self.wait()
            if processes.is_main():
                self.measure(step, known)
        else:
            return
        self.sealing = threading.Thread(target=self.seal, args=(step, about, self.sealing), daemon=True)
        self.sealing.start()

    def measure(self, step: int, known: dict) -> None:
        """Write down what a step was measured as, where orbax would have."""
        file = steps.directory(self.run_dir) / str(step) / METRICS / METRICS
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(file, json.dumps(known))

    def seal(self, step: int, about: dict, before: threading.Thread | None) -> None:
        """Once the step is committed: write the manifest of this process's files, and delete what is to go."""
        with contextlib.suppress(Exception):  # raised in the thread that trains, too
            self.manager.wait_until_finished()
        if before:
            before.join()
        folder = steps.directory(self.run_dir) / str(step)
        if step not in steps.committed(self.run_dir):
            return
        try:
            manifest.write(folder, about, steps.BESIDE, jax.process_index(), jax.process_count())
            self.failures = 0
            if processes.is_main():
                self.prune()
        except Exception as error:
            self.failed = error

    def prune(self) -> None:
        """Delete the steps that are not to be kept, but for those that are being read."""
        if self.lost:
            return
        there = steps.committed(self.run_dir)
        whole = [step for step in there if manifest.complete(steps.directory(self.run_dir) / str(step))]
        best = best_of(measured(self.run_dir, self.best), self.mode) if self.best else None
        for step in set(there) - {*there[-self.keep :], *whole[-1:], best}:
            steps.delete(self.run_dir, step)

    def latest(self) -> int | None:
        """The newest step that was saved, or None."""
        return self.manager.latest_step()

    def best_step(self) -> int | None:
        """The step that is best by ``best``; None where nothing is, or none was measured."""
        with self.writing():
            self.wait()
        return best_of(measured(self.run_dir, self.best), self.mode) if self.best else None

    def wait(self) -> None:
        """Until everything is on disk, manifests too. Raises what went wrong in the background."""
        self.manager.wait_until_finished()
        if self.sealing:
            self.sealing.join()
        self.wait_for_files()

    def wait_for_files(self) -> None:
        """``wait``, but not for the manifest of the last step."""
        self.manager.wait_until_finished()
        error, self.failed = self.failed, None
        if error:
            raise error

    def close(self) -> None:
        """Wait until everything is on disk, and delete what is not to be kept."""
        with self.writing():
            self.wait()
            processes.wait()  # the manifests of the other processes
            if processes.is_main():
                self.prune()
        self.manager.close()
        if self.littered and processes.is_main():
            self.sweep()


def describe_room(run_dir, state: TrainState, keep: int) -> list[str]:
    """What to say where the disk has room for less than three checkpoints: the one before, one under way, and one that
    is read."""
    if not is_local(run_dir):
        return []
    free, needed = shutil.disk_usage(run_dir).free, sum(x.nbytes for x in jax.tree.leaves(parts(state)))
    if free >= 3 * needed:
        return []
    size = lambda count: f"{count / 1e9:.3g} GB"
    return [
        f"warning: {run_dir}: {size(free)} are free, and a checkpoint takes {size(needed)}, of which checkpoint.keep: "
        f"{keep} stay; expected {size(3 * needed)}"
    ]


def describe(step: int, state: TrainState, extra: dict) -> dict[str, Any]:
    """What a manifest says of a checkpoint, besides its files."""
    mesh = next((x.sharding.mesh.shape for x in jax.tree.leaves(state) if hasattr(x.sharding, "mesh")), {})
    versions = {name: importlib.metadata.version(name) for name in ("jax", "orbax-checkpoint")}
    return {
        "step": step,
        "config_sha256": hashlib.sha256(str(extra.get("config", "")).encode()).hexdigest(),
        "versions": {"jaxrlhf": __version__, "python": platform.python_version(), **versions},
        "mesh": dict(mesh),
    }


def parts(state: TrainState) -> dict[str, Any]:
    """The state as items: one a role, and the rest. Bases are not among them (``save_bases``), nor roles without leaves
    of their own."""
    rest = {"step": state.step, "seed": state.seed, "opt_state": state.opt_state, "controls": state.controls}
    if not state.controls:
        del rest["controls"]
    roles = {f"{kind}.{role}": tree for kind in ("params", "slow") for role, tree in getattr(state, kind).items()}
    bases = {f"slow.{name}" for name in bases_in(state.slow)}
    return {item: tree for item, tree in roles.items() if item not in bases and jax.tree.leaves(tree)} | {STATE: rest}


def save_bases(run_dir, state: TrainState) -> None:
    """Write the frozen weights that roles share beside the checkpoints: once a run, before the first of them."""
    for name, tree in bases_in(state.slow).items():
        path = steps.base_directory(run_dir, name)
        if steps.last_committed(run_dir) is None or not path.exists():
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(path, tree, force=True)


def restore(run_dir, step: int, abstract: TrainState) -> TrainState:
    """The state of ``step``, laid out as ``abstract`` says: on another mesh than it was saved from, if need be.

    Raises ValueError, in one line, where other roles learned, or other ones did not."""
    folder = steps.directory(run_dir) / str(step)
    wanted, there = parts(abstract), {path.name for path in folder.iterdir()}
    if missing := sorted(wanted.keys() - there):
        held = ", ".join(sorted(name for name in there if name.startswith(("params.", "slow."))))
        raise ValueError(f"{folder.parent}: step {step} has no {missing[0]}, as the config wants; it has {held}")
    with ocp.StandardCheckpointer() as checkpointer:
        items = {item: checkpointer.restore(folder / item, tree) for item, tree in wanted.items()}
        place = lambda name: steps.base_directory(run_dir, name)
        bases = {name: checkpointer.restore(place(name), tree) for name, tree in bases_in(abstract.slow).items()}
    rest = items[STATE]
    return TrainState(
        step=rest["step"],
        seed=rest["seed"],
        params={role: items.get(f"params.{role}", {}) for role in abstract.params},
        slow={role: items.get(f"slow.{role}", {}) for role in abstract.slow} | bases,
        opt_state=rest["opt_state"],
        controls=rest.get("controls", {}),
    )
