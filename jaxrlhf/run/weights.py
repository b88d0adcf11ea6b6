"""What each role's weights start from: the run's own checkpoint, another run, files, or a draw."""

import functools
import os

from jaxrlhf.config.environment import observing
from jaxrlhf.config.record import Config
from jaxrlhf.log.run_dir import split_step
from jaxrlhf.models.config import resolve
from jaxrlhf.models.files import hf_config, hf_folder, hf_headers, peft
from jaxrlhf.run import saved_run
from jaxrlhf.run.origins import Weights, base_role, located, origin, read_start
from jaxrlhf.run.saved_run import SavedRuns
from jaxrlhf.types import Head, Role


def find_weights(saved_runs: SavedRuns, cfg: Config, role: Role, vocab_size: int, wanted: Head = "lm") -> Weights:
    """What ``role`` starts from: the run's own checkpoint if there is one, else what the config names. Of two heads in
    a folder the one that is ``wanted`` is taken.

    Raises ConfigError where there is nothing, or a folder does not hold all of a model."""
    step, extra = saved_runs.own_extra(cfg.run_dir) or (0, {"models": {}})
    if role in extra["models"]:
        return of_run(cfg.run_dir, step, extra, role)
    start, base = origin(cfg, role), base_role(cfg, role)
    if start.architecture is not None:
        shape = observing(cfg, resolve(start.architecture, vocab_size))
        return Weights("new", None, shape, "lm")
    path = start.init_from or ""
    if saved_run.is_run(path):
        step, extra = located(functools.partial(read_start, saved_runs), path, f"models.{base}")
        found = located(functools.partial(saved_run.find_role, extra["models"]), base, f"models.{base}", "init_from: ")
        return of_run(split_step(path)[0], step, extra, found)
    where = f"models.{base}"
    folder = os.fspath(located(hf_folder.locate, path, where))
    return located(lambda folder: in_folder(folder, wanted), folder, where, "init_from: ")


def of_run(run_dir: str, step: int, extra: dict, role: Role) -> Weights:
    """The Weights of a role that a run saved with ``step``; ``extra``: the JSON beside it."""
    shape, head = saved_run.model_of(extra["models"][role])
    return Weights("run", run_dir, shape, head, step, role, record=extra)


def in_folder(folder: str, wanted: Head) -> Weights:
    """The Weights of a Hugging Face folder. Raises ValueError where its files are not those of a whole model."""
    peft.need_whole(folder)
    shape, head = hf_config.read_config(folder)
    if wanted in ("scalar", "bare") and head == "lm" and hf_headers.has_score(folder):
        head = "scalar"
    held = hf_headers.examine(folder, shape, head)
    notes = (f"{folder}: not read: {hf_headers.kinds(held.left)}",) if held.left else ()
    return Weights("hf", folder, shape, None if head == "scalar" and not held.has_score else head, notes=notes)
