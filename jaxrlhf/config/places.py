"""The paths that a config names, and which of them can't be opened."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxrlhf.config.field_types import hints
from jaxrlhf.config.record import Config
from jaxrlhf.data.sources import DataConfig, SourceConfig
from jaxrlhf.errors import ConfigError, show
from jaxrlhf.models.files.gguf import PREFIX
from jaxrlhf.paths import malformed, unreachable


def places(cfg: Config) -> Iterator[tuple[str, str]]:
    """(key, path) of each."""
    yield "run_dir", cfg.run_dir
    sections = {f"data.{name}": getattr(cfg.data, name) for name in hints(DataConfig)} | {"eval.judge": cfg.eval.judge}
    for key, given in sections.items():
        if isinstance(given, SourceConfig) and given.path is not None:
            yield f"{key}.path", given.path
    if cfg.data.cache_dir is not None:
        yield "data.cache_dir", cfg.data.cache_dir
    starts = {f"models.{role}": model.init_from for role, model in cfg.models.items()}
    for key, start in (starts | {"tokenizer": cfg.tokenizer.init_from}).items():
        if start:
            yield f"{key}.init_from", start.removeprefix(PREFIX)


def place_problems(cfg: Config, wrong: Callable[[str], str | None] = malformed) -> Iterator[str]:
    """What is wrong with the paths, a line each."""
    for key, path in places(cfg):
        if why := wrong(path):
            yield f"{key}: {show(path)}: {why}"


def folder_problem(path: str) -> str | None:
    """Why ``path`` can't become a directory of this machine that is written to; None for a remote one."""
    if "://" in path:
        return None
    here = Path(path).absolute()
    try:
        there = next(folder for folder in (here, *here.parents) if folder.exists())
    except OSError as error:  # a name that is too long
        return f"{error.strerror}; expected a directory that can be written"
    if there.is_dir() and os.access(there, os.W_OK):
        return None
    why = "no right to write" if there.is_dir() else "a file" if there == here else f"{there} is a file"
    return f"{why}; expected a directory that can be written"


def check_places(cfg: Config, source: str = "config") -> None:
    """Raises ConfigError, a line a mistake, for paths that can't be opened on this machine."""
    problems = [*place_problems(cfg, unreachable)]
    if not problems and (why := folder_problem(cfg.run_dir)):
        problems = [f"run_dir: {show(cfg.run_dir)}: {why}"]
    if problems:
        raise ConfigError("\n".join(f"{source}: {problem}" for problem in problems))
