"""Runs the cells of a benchmark, one after the other in one process: each is an ordinary run directory.

A cell whose run is finished and measured is not repeated; one that was interrupted goes on. The programs of a method
are compiled for its first seed: the others find them in JAX's cache, as the seed is in the state and no part of them.
"""

import contextlib
import filecmp
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console

from jaxrlhf import api
from jaxrlhf.benchmarks.record import Benchmark, Cell, FinishedCell, Measured, Results
from jaxrlhf.cli.discover import find_configs
from jaxrlhf.config.check import check
from jaxrlhf.config.load import dump, parse
from jaxrlhf.config.record import Config
from jaxrlhf.config.yaml_text import flat, read_file, read_yaml
from jaxrlhf.errors import ConfigError, nearest, show
from jaxrlhf.hosts import compiler_flags
from jaxrlhf.hosts.signals import Stop
from jaxrlhf.log.progress import PlainLines, open_progress
from jaxrlhf.run.kept_programs import share_programs
from jaxrlhf.train import DONE, Step, run

KEEP_PROGRAMS_OF = 0.1  # seconds of compilation from which a program is kept: those of small models take little
COMPILED, FOUND = "backend_compile_duration", "/jax/compilation_cache/cache_hits"  # events of JAX


class StoppedBySignal(Exception):
    """A signal came: the same command goes on."""


class Done(NamedTuple):
    """What the cells of all seeds gave."""

    results: Results
    seconds: dict[str, list[float]]  # cell -> of training and measuring, a seed
    compiled: dict[str, list[int]]  # cell -> programs compiled, a seed: those in the cache do not count


def reproduce(benchmark: Benchmark, seeds: Sequence[int], out: Path, stop: Stop | None = None) -> Done:
    """All cells of all ``seeds``, in ``out``.

    Raises ConfigError before any work where a config is wrong or ``out`` holds other runs, and StoppedBySignal where
    ``stop`` heard a signal."""
    stop = stop or Stop()  # hears no signals
    compiler_flags.use_compilation_cache(KEEP_PROGRAMS_OF)
    folders = {seed: out / f"seed{seed}" for seed in seeds}
    configs = {
        (seed, cell.name): config_of(benchmark, cell, folder, seed)
        for seed, folder in folders.items()
        for cell in benchmark.cells
    }
    for (seed, name), cfg in configs.items():
        check(cfg, jax.device_count(), f"{benchmark.name}, cell {name}")
        check_kept(folders[seed] / f"{name}.json", cfg)
    kept: dict[str, list[Kept]] = {cell.name: [] for cell in benchmark.cells}
    progress = open_progress(len(configs), console=console_of(sys.stdout), unit="cell")
    with contextlib.closing(progress), share_programs():
        for seed, folder in folders.items():
            write_data(benchmark, folder, seed)
            for cell in benchmark.cells:
                run_dir = Path(configs[seed, cell.name].run_dir)
                finished = FinishedCell(cell.name, run_dir, folder, seed)
                number = 1 + sum(map(len, kept.values()))
                found = one_cell(benchmark, cell, configs[seed, cell.name], finished, stop, progress, number)
                kept[cell.name].append(found)
    results = Results(seeds, {name: [one.measured or {} for one in found] for name, found in kept.items()})
    each = lambda field: {name: [getattr(one, field) for one in found] for name, found in kept.items()}
    return Done(results, each("seconds"), each("compiled"))


# ---- configs and data -----------------------------------------------------------------------------------------------


def configs_folder(benchmark: Benchmark) -> Path:
    """Its YAML files. Raises ConfigError where there are none."""
    prefix = f"benchmarks/{benchmark.name}/"
    found = [path.parent for name, path in find_configs().items() if name.startswith(prefix)]
    if not found:
        raise ConfigError(f"benchmark: {benchmark.name}: no configs/{prefix}*.yaml; expected a file a method")
    return found[0]


def config_of(benchmark: Benchmark, cell: Cell, folder: Path, seed: int) -> Config:
    """The cell's config: its file, in which runs/benchmarks/NAME stands for ``folder``, and its overrides.

    Raises ConfigError for a file that is not there, or what is wrong in it."""
    configs, stem = configs_folder(benchmark), cell.config or cell.name
    path = configs / f"{stem}.yaml"
    if not path.exists():
        choices = nearest(stem, sorted(other.stem for other in configs.glob("*.yaml")))
        raise ConfigError(f"benchmark: {benchmark.name}: cell {cell.name}: no {path.name} in {configs}; {choices}")
    tree = read_yaml(read_file(os.fspath(path)), os.fspath(path))
    own = {"run_dir": os.fspath(folder / cell.name), "seed": seed, "data.cache_dir": os.fspath(folder.parent / "cache")}
    overrides = api.named(dict(cell.overrides))
    place = lambda value: relocated(value, f"runs/benchmarks/{benchmark.name}", os.fspath(folder))
    return api.load_config(place(tree), place(overrides) | own)


def relocated(value: Any, start: str, folder: str) -> Any:
    """``value`` with ``folder`` in the place of ``start`` wherever a text in it is a path below that."""
    if isinstance(value, dict):
        return {key: relocated(part, start, folder) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [relocated(part, start, folder) for part in value]
    below = isinstance(value, str) and (value == start or value.startswith(f"{start}/"))
    return folder + value.removeprefix(start) if below else value


def write_data(benchmark: Benchmark, folder: Path, seed: int) -> None:
    """The seed's data, in folder/data.

    Raises ConfigError where other data are there: runs that learned from them would not be of this benchmark."""
    there, new = folder / "data", folder / "data.new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    benchmark.data(new, seed)
    if there.exists():
        files = sorted(str(path.relative_to(new)) for path in new.rglob("*") if path.is_file())
        _, differ, missing = filecmp.cmpfiles(new, there, files, shallow=False)
        shutil.rmtree(new)
        if differ or missing:
            other = (differ + missing)[0]
            raise ConfigError(f"--out: {there / other}: data of another version; expected another folder, or none")
        return
    new.rename(there)


# ---- one cell -------------------------------------------------------------------------------------------------------


class Kept(NamedTuple):
    """OUT/seed<N>/CELL.json: what is known of a cell."""

    config: str  # what its run was made by
    source: str = ""  # SHA-256 of the benchmark's file that measured it: with another one it is measured again
    seconds: float = 0.0  # of all commands that worked at it
    compiled: int = 0
    measured: Measured | None = None  # None: it is not finished


def read_kept(path: Path) -> Kept | None:
    return Kept(**json.loads(path.read_text())) if path.exists() else None


def write_kept(path: Path, kept: Kept) -> None:
    """Whole or not at all."""
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(kept._asdict(), indent=1) + "\n")
    os.replace(beside, path)


def check_kept(path: Path, cfg: Config) -> None:
    """Raises ConfigError where the cell's run was made by another config: it would pass for one of this."""
    kept, wanted = read_kept(path), dump(cfg)
    if kept is not None and not says(kept.config, cfg, os.fspath(path)):
        sides = [(sign, flat(read_yaml(text, os.fspath(path)))) for sign, text in (("-", kept.config), ("+", wanted))]
        (_, before), (_, after) = sides
        keys = [key for key in {**before, **after} if before.get(key, ...) != after.get(key, ...)]
        changed = ", ".join(f"{sign}{key}: {show(tree[key])}" for key in keys for sign, tree in sides if key in tree)
        raise ConfigError(f"--out: {path.with_suffix('')}: made by another config ({changed}); expected another folder")


def says(text: str, cfg: Config, source: str) -> bool:
    """Whether the YAML of a version that may order keys otherwise, and lack some, is ``cfg``: what it lacks has its
    default."""
    try:
        return parse(read_yaml(text, source), source) == cfg
    except ConfigError:
        return False


def one_cell(
    benchmark: Benchmark, cell: Cell, cfg: Config, finished: FinishedCell, stop: Stop, progress: PlainLines, number: int
) -> Kept:
    """Trains and measures the cell, unless that was done. Raises StoppedBySignal where ``stop`` heard a signal."""
    path, name = finished.folder / f"{cell.name}.json", f"{cell.name}, seed {finished.seed}"
    source = hashlib.sha256(Path(sys.modules[benchmark.measure.__module__].__file__ or "").read_bytes()).hexdigest()
    kept = read_kept(path) or Kept(dump(cfg))
    if kept.measured is not None and kept.source == source:
        progress.say(f"cell {number}/{progress.total}  {name}: done before")
        return kept
    progress.pace.saw(number - 1)
    progress.now(name)
    watch = lambda step: progress.now(f"{name}, iteration {step.number}/{cfg.iterations or '?'}")
    started, count = time.perf_counter(), [0]
    try:
        with counting(count), said_in(finished.folder / f"{cell.name}.log"):
            train_cell(cell, cfg, finished, stop, watch)
            measured = benchmark.measure(finished)
    finally:
        spent = kept.seconds + time.perf_counter() - started
        kept = kept._replace(seconds=spent, compiled=kept.compiled + count[0])
        write_kept(path, kept)
    kept = kept._replace(measured=measured, source=source)
    write_kept(path, kept)
    progress.show(number, [f"{name}:", *numbers_of(measured, benchmark.shown), f"{spent:.0f} s"])
    return kept


def train_cell(cell: Cell, cfg: Config, finished: FinishedCell, stop: Stop, watch: Callable[[Step], None]) -> None:
    """The cell's run to its end. Raises StoppedBySignal where ``stop`` heard a signal."""
    if stop.asked is None and cell.prepare is not None:
        cell.prepare(finished.folder, finished.seed)
    if stop.asked is not None or run(cfg, stop=stop, watch=watch) != DONE or stop.asked is not None:
        raise StoppedBySignal


def numbers_of(measured: Measured, shown: Sequence[str]) -> list[str]:
    """ "exact_match 0.710" of those that the cell has."""
    return [f"{name} {measured[name]:.3f}" for name in shown if name in measured]


def console_of(stream: Any) -> Console:
    """On ``stream`` as it is now: what runs say is written elsewhere."""
    return Console(file=stream, force_terminal=stream.isatty(), force_jupyter=False)


@contextlib.contextmanager
def said_in(path: Path) -> Iterator[None]:
    """What is printed goes to the end of the file."""
    with open(path, "a", encoding="utf-8", buffering=1) as file, contextlib.redirect_stdout(file):
        yield


@contextlib.contextmanager
def counting(count: list[int]) -> Iterator[None]:
    """Adds the programs that XLA compiles meanwhile to ``count[0]``; those in JAX's cache on disk do not count."""

    def compiled(event: str, duration_secs: float, **_: Any) -> None:
        count[0] += event.endswith(COMPILED)

    def found(event: str, **_: Any) -> None:
        count[0] -= event == FOUND

    jax.monitoring.register_event_duration_secs_listener(compiled)
    jax.monitoring.register_event_listener(found)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(compiled)
        jax.monitoring.unregister_event_listener(found)
