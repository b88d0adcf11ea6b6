"""One run as one record: the component configs composed, read from YAML and the command line, checked before any work.

Precedence: the defaults of the dataclasses < the YAML file < ``a.b.c=value`` on the command line. Every error is one
line: where it was written, the key, the value, what was expected, the nearest valid choice.
``python -m jaxrlhf.config`` prints the reference of all keys.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, Literal, NamedTuple

import yaml
from etils import epath
from pydantic import ConfigDict, TypeAdapter, ValidationError

from jaxrlhf import outside
from jaxrlhf.algorithms import ALGORITHMS, find
from jaxrlhf.config_errors import ConfigError, dotted, explain, show, suggest
from jaxrlhf.config_ranges import range_problems
from jaxrlhf.config_yaml import Dumper, read_file, read_yaml
from jaxrlhf.data.sources import DataConfig, SourceConfig
from jaxrlhf.distributed import DistributedConfig
from jaxrlhf.generate import GenerateConfig
from jaxrlhf.log.metrics import LogConfig
from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.kernels import Asked
from jaxrlhf.optim import OptimizerConfig
from jaxrlhf.rewards.functions import RewardsConfig
from jaxrlhf.sharding import MeshConfig
from jaxrlhf.types import Algorithm, Head, Role

# ---- the record -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RoleConfig:
    """Where the weights of one role come from: init_from or architecture."""

    init_from: str | None = None  # a Hugging Face folder, gguf:FILE, a hub name, RUN, RUN@best, RUN@STEP, or a role
    architecture: ModelConfig | None = None  # random weights of this shape
    share_trunk: bool = False  # value: no model of its own but a head on the policy, whose pass serves both
    trunk_gradient: float = 0.1  # share_trunk: the policy learns from its loss + this x the value loss (vf_coef)


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
    """Number formats; that of the optimizer's first moment is optimizer.<role>.dtype."""

    params: Literal["float32", "bfloat16"] = "float32"  # stored weights of roles that do not learn; others: float32
    compute: Literal["float32", "bfloat16"] = "float32"  # activations and matrix products


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Where the tokenizer comes from."""

    init_from: str | None = None  # a Hugging Face folder, a hub name or a run; null: that of the policy or reward model
    train_vocab_size: int | None = None  # train a byte-level BPE of this size on the demonstrations instead


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """Rows of one iteration, over all devices. algorithm.num_minibatches splits them."""

    prompts_per_step: int = 64  # prompts of an on-policy iteration
    samples_per_prompt: int = 1  # responses to each of them
    share_prompts: bool = True  # read a prompt once for all of them in scoring and training, not only in sampling
    sequences_per_step: int = 64  # rows of demonstrations (sft)
    preferences_per_step: int = 32  # pairs
    unpaired_per_step: int = 32  # responses with a label
    micro_batch_size: int | None = None  # rows whose activations are held at once; null: all, fewer on CPUs
    pack_widths: int = 1  # widths, each compiled, that a micro-batch's responses may be packed into; 1: no packing


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the whole state is saved, and which saves stay."""

    every: int = 50  # iterations; the last one is saved too
    background: bool = True  # write while training goes on, which takes a copy of the state in host memory
    keep: int = 2  # latest checkpoints that stay
    best: str | None = None  # a metric of the evaluation ("eval/score/mean") whose best checkpoint stays too
    mode: Literal["max", "min"] = "max"  # which value of it is best


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation on held-out data."""

    every: int = 0  # iterations; 0: only at the end
    size: int = 256  # held-out examples
    samples: int = 8  # responses that go to samples.jsonl
    judge: SourceConfig | None = None  # labelled texts to train an outside judge on


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run."""

    run_dir: str  # where everything that the run writes goes; may be gs://
    iterations: int | None = None  # updates of sft, rm and dpo; on policy rounds of sampling and updates; or epochs
    epochs: float | None = None  # in place of iterations: passes over the rows of the training data
    seed: int = 0  # of weights, data order and sampling
    algorithm_name: str  # algorithm.name in YAML: a name of the table, or "package.module:NAME" of an Algorithm
    algorithm: Any  # the config of that algorithm
    models: dict[Role, RoleConfig] = dataclasses.field(default_factory=dict)
    tokenizer: TokenizerConfig = TokenizerConfig()
    precision: PrecisionConfig = PrecisionConfig()
    remat: Literal["none", "full", "dots"] = "none"  # what is recomputed backward: nothing, layers, all but matmuls
    scan_layers: bool | None = None  # one compiled body for all layers; null: unless they are few, on a CPU
    attention: Asked = "auto"  # the kernel: splash on TPUs and cudnn on GPUs where they can compute the model, else xla
    deterministic: bool = False  # GPUs: the same bits in every run, as TPUs and CPUs give anyway; slower
    optimizer: dict[Role, OptimizerConfig] = dataclasses.field(default_factory=dict)  # "default" serves the other roles
    mesh: MeshConfig = MeshConfig()
    distributed: DistributedConfig = DistributedConfig()
    data: DataConfig = DataConfig()
    batch: BatchConfig = BatchConfig()
    generate: GenerateConfig = GenerateConfig()
    rewards: RewardsConfig = RewardsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    profile: str | None = None  # "10:13": steps 10, 11 and 12 are traced into RUN_DIR/profile, for perfetto

    @property
    def length(self) -> int:
        """The iterations of the run, where its epochs have been counted."""
        assert self.iterations is not None, "epochs have not been counted"
        return self.iterations

    def optimizer_of(self, role: Role) -> OptimizerConfig:
        """The role's own row of ``optimizer``, else the row "default", else the defaults."""
        return self.optimizer.get(role) or self.optimizer.get("default") or OptimizerConfig()


# ---- reading and writing --------------------------------------------------------------------------------------------


def load(path: os.PathLike | str, overrides: Sequence[str] = ()) -> Config:
    """The config in the YAML file ``path`` with ``a.b.c=value`` overrides applied. Raises ConfigError."""
    return load_all([path], overrides)[0]


def load_all(paths: Sequence[os.PathLike | str], overrides: Sequence[str] = ()) -> list[Config]:
    """The configs that one command runs in order. An override ``NAME:a.b.c=value`` is only for the config whose file
    stem or algorithm is NAME; a plain one is for each of them. Raises ConfigError."""
    sources = [os.fspath(path) for path in paths]
    trees = [read_yaml(read_file(source), source) for source in sources]
    for source in sources:
        outside.look_beside(source)
    edits = [split_override(text) for text in overrides]
    names = [{PurePath(source).stem, str(algorithm_name(tree))} for source, tree in zip(sources, trees)]
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

    name = algorithm_name(tree)
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
    cfg = with_default_roles(dataclasses.replace(cfg, algorithm=chosen, run_dir=run_dir))
    if outside := [*range_problems(cfg)]:
        raise fail(outside)
    return cfg


def length_problems(tree: Mapping[str, Any]) -> list[tuple[tuple, str]]:
    """How long a run is, is said once."""
    iterations, epochs = tree.get("iterations"), tree.get("epochs")
    if iterations is None and epochs is None:
        return [(("iterations",), "missing; expected an integer, or epochs")]
    if iterations is not None and epochs is not None:
        return [(("epochs",), f"{show(epochs)}: iterations: {show(iterations)} is given too; expected one of them")]
    return []


def read_record(cls: type, section: Any, keys: tuple[str, ...]) -> tuple[Any, list[tuple[tuple, str]]]:
    """``section`` as the dataclass ``cls``, and the mistakes in it as (keys, text). ``keys``: where it stands.

    Strict JSON rules: no text or boolean for a number, no number for text; a whole number will do for a float. Extra
    keys are refused in every record below."""
    rules = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    adapter = TypeAdapter(dict[str, cls], config=rules)  # type: ignore[valid-type]
    try:
        return adapter.validate_json(json.dumps({"": section}))[""], []
    except ValidationError as error:
        rows = error.errors(include_url=False)
        return None, [((*keys, *row["loc"][1:]), explain(row, cls)) for row in rows]


def dump(cfg: Config, whole: bool = True) -> str:
    """YAML that loads back to an equal Config; not ``whole``: without what is at its default."""
    tree = dataclasses.asdict(cfg) if whole else without_defaults(cfg)
    tree["algorithm"] = {"name": tree.pop("algorithm_name"), **tree["algorithm"]}
    return yaml.dump(json.loads(json.dumps(tree)), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


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


def find_algorithm(name: Any) -> Algorithm:
    """The record of this name: a row of the table, or "package.module:NAME". Raises ConfigError."""
    names = sorted(ALGORITHMS)
    if not isinstance(name, str):
        raise ConfigError(f"{show(name)}: expected a name; choices: {', '.join(names)}, package.module:NAME")
    try:
        return find(name)
    except KeyError:
        raise ConfigError(f"{name}: unknown algorithm; {suggest(name, names)}") from None
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error


def with_default_roles(cfg: Config) -> Config:
    """Fills in the roles that the algorithm needs and the config leaves out: the reference starts as the policy, the
    value model as the reward model, or where there is none, or it shares a trunk, as the policy. A policy that learns
    from its own responses always has a reference: an evaluation compares with it."""
    trained, slow = roles_of(cfg)
    needed = {*trained, *slow} | ({"reference"} if find_algorithm(cfg.algorithm_name).rollout else set())
    origins = {"reference": "policy", "value": "reward" if "reward" in needed else "policy"}
    left_out = [role for role in origins if role in needed and role not in cfg.models]
    models = cfg.models | {role: RoleConfig(init_from=origins[role]) for role in left_out}
    for role, model in models.items():
        if model.share_trunk and model.init_from is None and model.architecture is None:
            models[role] = dataclasses.replace(model, init_from="policy")
    return dataclasses.replace(cfg, models=models)


def roles_of(cfg: Config) -> tuple[dict[Role, Head], dict[Role, Head]]:
    """(trained, slow): the roles that the run needs. A reward function takes the place of the reward model; what shares
    a trunk is a bare head."""
    algorithm = find_algorithm(cfg.algorithm_name)
    scored = cfg.rewards.on_host and algorithm.rollout is not None  # offline there is nothing to score
    bare: dict[Role, Head] = {role: "bare" for role, model in cfg.models.items() if model.share_trunk}

    def needed(heads: dict[Role, Head]) -> dict[Role, Head]:
        return {role: bare.get(role, head) for role, head in heads.items() if not (scored and role == "reward")}

    trained, slow = algorithm.roles(cfg.algorithm)
    return needed(trained), needed(slow)


def describe_precision(cfg: Config) -> list[str]:
    """What to say where precision.params is not float32: whose weights are stored so, and whose are not."""
    (trained, slow), params = roles_of(cfg), cfg.precision.params
    if params == "float32":
        return []
    return [
        f"precision.params: {params} for {', '.join(slow) or 'no role'}; float32 for {', '.join(trained)}: "
        "small updates to weights would be rounded away"
    ]


def trunks_of(cfg: Config) -> dict[Role, Role]:
    """The roles that are a bare head -> the role on whose trunk it stands."""
    return {role: model.init_from for role, model in cfg.models.items() if model.share_trunk and model.init_from}


# ---- the command line -----------------------------------------------------------------------------------------------


class Override(NamedTuple):
    """One ``[target:]a.b.c=value`` of the command line."""

    target: str | None
    path: tuple[str, ...]
    value: Any


def split_override(text: str) -> Override:
    """Reads an override; its value is YAML."""
    left, equals, value = text.partition("=")
    target, colon, keys = left.rpartition(":")
    path = tuple(keys.split("."))
    if not equals or not all(path) or (colon and not target):
        raise ConfigError(f"command line: {text}: expected key=value, as in optimizer.default.learning_rate=1e-4")
    value = read_yaml(value, f"command line: {left}", mapping=False)
    return Override(target or None, path, value)


def apply_override(tree: dict, edit: Override) -> None:
    """Puts the value into ``tree``, making the sections on the way."""
    for depth, key in enumerate(edit.path[:-1]):
        if tree.get(key) is None:
            tree[key] = {}
        tree = tree[key]
        if not isinstance(tree, dict):
            where = dotted(edit.path[: depth + 1])
            raise ConfigError(f"command line: {dotted(edit.path)}: {where} holds {show(tree)}, which is not a section")
    tree[edit.path[-1]] = edit.value


if __name__ == "__main__":
    from jaxrlhf.config_reference import reference

    print(reference(Config))
