"""A config read from YAML and the command line, checked key by key, and written back.

Precedence: the defaults of the dataclasses < ``preset`` < the YAML file < ``a.b.c=value`` on the command line. Every
error is one line: where it was written, the key, the value, what was expected, the nearest valid choice.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import yaml
from etils import epath

from jaxrlhf import user_code
from jaxrlhf.config.members import with_members
from jaxrlhf.config.overrides import apply_override, split_override
from jaxrlhf.config.presets import with_preset
from jaxrlhf.config.ranges import range_problems
from jaxrlhf.config.record import Config
from jaxrlhf.config.roles import find_algorithm, with_default_roles
from jaxrlhf.config.strict import read_record, suggest
from jaxrlhf.config.yaml_text import Dumper, read_file, read_yaml
from jaxrlhf.errors import ConfigError, dotted, show
from jaxrlhf.hosts.processes import DistributedConfig

# keys that no longer exist: value -> what says the same now; the config.yaml of older runs holds every key
REMOVED: dict[tuple[str, str], dict[Any, dict[str, Any]]] = {
    ("generate", "slots"): {0: {}},
    ("log", "tensorboard"): {True: {}, False: {"trackers": []}},
}


def load(path: os.PathLike | str, overrides: Sequence[str] = ()) -> Config:
    """The config in the YAML file ``path`` with ``a.b.c=value`` overrides applied. Raises ConfigError."""
    return load_all([path], overrides)[0]


def load_all(paths: Sequence[os.PathLike | str], overrides: Sequence[str] = ()) -> list[Config]:
    """The configs that one command runs in order. An override ``NAME:a.b.c=value`` is only for the config whose file
    stem or algorithm is NAME; a plain one is for each of them. Raises ConfigError."""
    sources = [os.fspath(path) for path in paths]
    trees = [read_yaml(read_file(source), source) for source in sources]
    for source in sources:
        user_code.look_beside(source)
    edits = [split_override(text) for text in overrides]
    named = lambda tree, source: str(algorithm_name(with_preset(tree, source)))
    names = [{PurePath(source).stem, named(tree, source)} for source, tree in zip(sources, trees)]
    for edit in edits:
        if edit.target and not any(edit.target in known for known in names):
            hint = suggest(edit.target, sorted(set().union(*names)))
            raise ConfigError(f"command line: {edit.target}:{'.'.join(edit.path)}: no config of this name; {hint}")
    configs = []
    for source, tree, known in zip(sources, trees, names):
        mine = [edit for edit in edits if edit.target is None or edit.target in known]
        for edit in mine:
            apply_override(tree, edit)
        configs.append(parse(tree, source, [edit.path for edit in mine]))
    for source, cfg in zip(sources, configs):
        if cfg.distributed != configs[0].distributed:
            raise ConfigError(f"{source}: distributed: not that of {sources[0]}; expected one for the whole command")
    used: dict[str, str] = {}
    for source, cfg in zip(sources, configs):
        if (other := used.setdefault(cfg.run_dir, source)) != source:
            raise ConfigError(
                f"{source}: run_dir: {cfg.run_dir}: already the run_dir of {other}; expected one for each"
            )
    check_best_starts(list(zip(sources, configs)))
    return configs


def check_best_starts(configs: Sequence[tuple[str, Config]]) -> None:
    """Raises ConfigError where a config starts from RUN@best, and an earlier one, which makes that run, keeps none."""
    made: dict[str, tuple[str, Config]] = {}
    for source, cfg in configs:
        names = {f"models.{role}": model.init_from for role, model in cfg.models.items()}
        for where, name in (names | {"tokenizer": cfg.tokenizer.init_from}).items():
            run, _, step = (name or "").rpartition("@")
            if step == "best" and run in made and not made[run][1].checkpoint.best:
                raise ConfigError(f"{source}: {where}.init_from: {name}: {made[run][0]} sets no checkpoint.best")
        made[cfg.run_dir] = source, cfg


def load_beside(path: os.PathLike | str) -> list[Config]:
    """The other configs in the folder of ``path`` (those that are right): they may make what its run starts from."""
    here, found = epath.Path(path), []
    for other in sorted(here.parent.glob("*.yaml")):
        if other.name != here.name:
            with contextlib.suppress(ConfigError):
                found.append(load(other))
    return found


def parse(tree: Mapping[str, Any], source: str, overridden: Sequence[tuple[str, ...]] = ()) -> Config:
    """``tree`` (what YAML says) as a Config. ``overridden``: keys that were given on the command line."""

    def fail(problems: Sequence[tuple[tuple, str]]) -> ConfigError:
        given = lambda keys: any(keys[: len(key)] == key for key in overridden)
        origin = lambda keys: "command line" if given(tuple(map(str, keys))) else source
        return ConfigError("\n".join(f"{origin(keys)}: {dotted(keys)}: {text}" for keys, text in problems))

    by_hand = ("preset",) in overridden
    tree = with_preset(without_removed(tree), "command line" if by_hand else source)
    tree, name = with_members(tree, source), algorithm_name(tree)
    try:
        algorithm = find_algorithm(name)
    except ConfigError as error:
        raise fail([(("algorithm", "name"), str(error))]) from None
    section = {key: value for key, value in tree["algorithm"].items() if key != "name"}
    chosen, wrong = read_record(algorithm.config, section, ("algorithm",))
    hidden = {key: value for key, value in tree.items() if key == "algorithm_name"}
    wrong += [((key,), f"unknown key (value {show(value)}); nearest: algorithm.name") for key, value in hidden.items()]
    cfg, more = read_record(Config, {**tree, "algorithm_name": name, "algorithm": None}, ())
    more += length_problems(tree)
    if wrong or more:
        raise fail(wrong + more)
    if not cfg.run_dir.strip():
        raise fail([(("run_dir",), f"{show(cfg.run_dir)}: expected a directory, as in runs/mine")])
    run_dir = os.path.expanduser(cfg.run_dir)
    cfg = with_default_roles(dataclasses.replace(cfg, algorithm=chosen, run_dir=run_dir), algorithm)
    if outside := [*range_problems(cfg)]:
        raise fail(outside)
    return cfg


def without_removed(tree: Mapping[str, Any]) -> dict[str, Any]:
    """``tree`` with what stands for the keys in REMOVED; with a value that has no equal they stay, as unknown keys."""
    kept = dict(tree)
    for (section, key), equal in REMOVED.items():
        inside = kept.get(section)
        if isinstance(inside, dict) and isinstance(value := inside.get(key), int) and value in equal:
            kept[section] = equal[value] | {name: other for name, other in inside.items() if name != key}
    return kept


def length_problems(tree: Mapping[str, Any]) -> list[tuple[tuple, str]]:
    """How long a run is, is said once."""
    iterations, epochs = tree.get("iterations"), tree.get("epochs")
    if iterations is None and epochs is None:
        return [(("iterations",), "missing; expected an integer, or epochs")]
    if iterations is not None and epochs is not None:
        return [(("epochs",), f"{show(epochs)}: iterations: {show(iterations)} is given too; expected one of them")]
    return []


def dump(cfg: Config, whole: bool = True) -> str:
    """YAML that loads back to an equal Config; not ``whole``: without what is at its default, and
    without the preset, which has other defaults."""
    return yaml.dump(as_tree(cfg, whole), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


def as_tree(cfg: Config, whole: bool = True) -> dict[str, Any]:
    """What ``dump`` writes, as ``read_yaml`` reads it."""
    tree = dataclasses.asdict(cfg) if whole else without_defaults(dataclasses.replace(cfg, preset=None))
    tree["algorithm"] = {"name": tree.pop("algorithm_name"), **tree["algorithm"]}
    return json.loads(json.dumps(tree))


def without_defaults(value: Any) -> Any:
    """``value`` as a tree, in which records hold only the fields that are not at their default."""
    if isinstance(value, dict):
        return {key: without_defaults(item) for key, item in value.items()}
    if not dataclasses.is_dataclass(value):
        return value
    fields = {field.name: (field, getattr(value, field.name)) for field in dataclasses.fields(value)}
    fresh = lambda field: field.default_factory() if callable(field.default_factory) else field.default
    return {name: without_defaults(item) for name, (field, item) in fields.items() if item != fresh(field)}


def without_place(cfg: Config) -> Config:
    """``cfg`` as a run is saved: where its processes met is no part of it, and differs from process to process."""
    return dataclasses.replace(cfg, distributed=DistributedConfig())


def algorithm_name(tree: Mapping[str, Any]) -> Any:
    """What stands at algorithm.name; None where nothing does."""
    section = tree.get("algorithm")
    return section.get("name") if isinstance(section, dict) else None
