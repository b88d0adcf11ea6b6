"""One run as one record: the component configs composed, read from YAML and the command line, checked before any work.

Precedence: the defaults of the dataclasses < the YAML file < ``a.b.c=value`` on the command line. Every error is one
line: where it was written, the key, the value, what was expected, the nearest valid choice.
``python -m jaxrlhf.config`` prints the reference of all keys.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import io
import json
import math
import os
import re
import textwrap
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml
from etils import epath
from pydantic import ConfigDict, TypeAdapter, ValidationError

from jaxrlhf.algorithms import ALGORITHMS, find
from jaxrlhf.data.sources import DataConfig, SourceConfig
from jaxrlhf.generate import GenerateConfig
from jaxrlhf.metrics import LogConfig
from jaxrlhf.models.transformer import ModelConfig, resolve
from jaxrlhf.optim import OptimizerConfig
from jaxrlhf.sharding import AXES, RULES, MeshConfig, mesh_shape
from jaxrlhf.types import Algorithm, Role


class ConfigError(ValueError):
    """What is wrong with a config: one line for each mistake."""


# ---- the record -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RoleConfig:
    """Where the weights of one role come from: exactly one of the two."""

    init_from: str | None = None  # a Hugging Face folder, a hub name, a jaxrlhf run, or another role (policy, reward)
    architecture: ModelConfig | None = None  # random weights of this shape


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
    """Number formats; that of the optimizer's moments is optimizer.<role>.dtype."""

    params: Literal["float32", "bfloat16"] = "float32"  # stored weights
    compute: Literal["float32", "bfloat16"] = "float32"  # activations and matrix products


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Where the tokenizer comes from."""

    init_from: str | None = (
        None  # a Hugging Face folder, a hub name or a run; null: models.policy's, else models.reward's
    )
    train_vocab_size: int | None = None  # train a byte-level BPE of this size on the demonstrations instead


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """Rows of one iteration, over all devices. algorithm.num_minibatches splits them."""

    prompts_per_step: int = 64  # prompts of an on-policy iteration
    samples_per_prompt: int = 1  # responses to each of them
    sequences_per_step: int = 64  # rows of demonstrations (sft)
    preferences_per_step: int = 32  # pairs
    micro_batch_size: int | None = None  # rows whose activations are held at once; null: the whole minibatch


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the whole state is saved, and which saves stay."""

    every: int = 50  # iterations; the last one is saved too
    keep: int = 2  # latest checkpoints that stay
    best: str | None = None  # a metric of the evaluation ("eval/score/mean") whose best checkpoint stays too
    mode: Literal["max", "min"] = "max"  # which value of it is best


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation on held-out data."""

    every: int = 0  # iterations; 0: only at the end
    size: int = 256  # held-out examples
    samples: int = 8  # responses that go to samples.jsonl
    judge: SourceConfig | None = None  # labelled texts for an outside judge, which `jaxrlhf evaluate` asks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run."""

    run_dir: str  # where everything that the run writes goes; may be gs://
    iterations: int  # updates of sft and rm; rounds of sampling and updates on policy
    seed: int = 0  # of weights, data order and sampling
    algorithm_name: str  # algorithm.name in YAML: a name of the table, or "package.module:NAME" of an Algorithm
    algorithm: Any  # the config of that algorithm
    models: dict[Role, RoleConfig] = dataclasses.field(default_factory=dict)
    tokenizer: TokenizerConfig = TokenizerConfig()
    precision: PrecisionConfig = PrecisionConfig()
    remat: Literal["none", "full", "dots"] = "none"  # what is recomputed backward: nothing, layers, all but matmuls
    optimizer: dict[Role, OptimizerConfig] = dataclasses.field(default_factory=dict)  # "default" serves the other roles
    mesh: MeshConfig = MeshConfig()
    data: DataConfig = DataConfig()
    batch: BatchConfig = BatchConfig()
    generate: GenerateConfig = GenerateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()

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
    used: dict[str, str] = {}
    for source, cfg in zip(sources, configs):
        if (other := used.setdefault(cfg.run_dir, source)) != source:
            raise ConfigError(
                f"{source}: run_dir: {cfg.run_dir}: already the run_dir of {other}; expected one for each"
            )
    return configs


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
    if wrong or more:
        raise fail(wrong + more)
    cfg = with_default_roles(dataclasses.replace(cfg, algorithm=chosen))
    if outside := [*range_problems(cfg)]:
        raise fail(outside)
    return cfg


def dump(cfg: Config) -> str:
    """YAML that loads back to an equal Config."""
    tree = dataclasses.asdict(cfg)
    tree["algorithm"] = {"name": tree.pop("algorithm_name"), **tree["algorithm"]}
    return yaml.dump(json.loads(json.dumps(tree)), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


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
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{name}: {error}; expected package.module:NAME of an Algorithm") from None


def with_default_roles(cfg: Config) -> Config:
    """Fills in the roles that the algorithm needs and the config leaves out: the reference starts as the policy, the
    value model as the reward model."""
    origins = {"reference": "policy", "value": "reward"}
    left_out = [role for role in roles_of(cfg) if role in origins and role not in cfg.models]
    return dataclasses.replace(
        cfg, models=cfg.models | {role: RoleConfig(init_from=origins[role]) for role in left_out}
    )


def roles_of(cfg: Config) -> list[Role]:
    """The roles that the algorithm needs, trained ones first."""
    trained, slow = find_algorithm(cfg.algorithm_name).roles(cfg.algorithm)
    return [*trained, *slow]


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


# ---- YAML -----------------------------------------------------------------------------------------------------------

MAX_YAML_BYTES = 64 * 1024
MAX_ALIASES = 16  # with aliases of aliases a few lines can stand for gigabytes


class Loader(yaml.SafeLoader):
    """Safe YAML with the scalars of YAML 1.2: only true and false are booleans ("no" is a word), 1e-4 is a number,
    dates are text. Keys are words, each once in its section."""

    aliases = 0

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            self.aliases += 1
            if self.aliases > MAX_ALIASES:
                raise yaml.constructor.ConstructorError(
                    problem=f"more than {MAX_ALIASES} aliases", problem_mark=self.peek_event().start_mark
                )
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            word = key.value if key.tag == "tag:yaml.org,2002:str" else None
            if word is None or word in seen:
                problem = f"key {key.value} appears twice" if word else f"key {key.value}: expected a word"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
            seen.add(word)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Quotes whatever Loader, or a reader of YAML 1.1, would not take for text."""

    def ignore_aliases(self, data):
        return True


FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$")
Loader.yaml_implicit_resolvers = {}
Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"(~|null|Null|NULL)?$"), ["~", "n", "N", ""])
Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), [*"tTfF"])
Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9]*)$"), [*"-+0123456789"])
Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, [*"-+.0123456789"])
Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, [*"-+.0123456789"])
Loader.yaml_constructors = {
    tag: make
    for tag, make in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
}


def read_file(source: str) -> bytes:
    """The bytes of a config file, at most MAX_YAML_BYTES of them."""
    path = epath.Path(source)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_YAML_BYTES + 1)
    except FileNotFoundError:
        beside = sorted(os.fspath(p) for p in path.parent.glob("*.y*ml")) if path.parent.exists() else []
        raise ConfigError(f"{source}: no such file{'; ' + suggest(source, beside) if beside else ''}") from None
    except OSError as error:
        raise ConfigError(f"{source}: {error.strerror or error}") from None
    if len(data) > MAX_YAML_BYTES:
        raise ConfigError(f"{source}: more than {MAX_YAML_BYTES} bytes, which no config needs")
    return data


def read_yaml(text: bytes | str, source: str, mapping: bool = True) -> Any:
    """The tree that ``text`` says: dicts, lists, text, numbers, booleans, None, nothing shared. Raises ConfigError."""
    try:
        tree = json.loads(json.dumps(yaml.load(text, Loader=Loader)))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        said = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{source}: {where}{one_line(said or error)}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        text = "nested too deeply" if isinstance(error, RecursionError) else one_line(error)
        raise ConfigError(f"{source}: {text}") from None
    if not mapping:
        return tree
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: {show(tree)}: expected sections and key: value lines")
    return tree


# ---- types, and what to say about a mistake -------------------------------------------------------------------------


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


def explain(row: Mapping[str, Any], cls: type) -> str:
    """One mistake found by pydantic, in our words."""
    *inside, last = row["loc"][1:] or ("",)
    kind, value = row["type"], show(row["input"])
    if kind == "unexpected_keyword_argument":
        return f"unknown key (value {value}); {suggest(last, names_under(cls, inside), cls)}"
    if kind == "missing":
        return f"missing; expected {type_name(type_under(cls, row['loc'][1:])).replace('`', '')}"
    if kind == "literal_error":
        choices = get_args(bare(type_under(cls, row["loc"][1:])))
        close = difflib.get_close_matches(str(row["input"]), choices, 1)
        return f"{value}: expected one of {', '.join(choices)}{f'; nearest: {close[0]}' if close else ''}"
    return f"{value}: expected {EXPECTED.get(kind) or one_line(row['msg'])}"


EXPECTED = {
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a section of key: value lines",
    "dataclass_type": "a section of key: value lines",
}


def suggest(word: Any, choices: Sequence[Any], cls: type | None = None) -> str:
    """The choice nearest to ``word``; where none is near, a key of this name elsewhere in ``cls``, or all choices."""
    choices = [str(choice) for choice in choices]
    if close := difflib.get_close_matches(str(word), choices, 1):
        return f"nearest: {close[0]}"
    if cls and (elsewhere := [path for path, record in records(cls) if word in hints(record) and path]):
        return f"nearest: {elsewhere[0]}.{word}"
    return f"choices: {', '.join(choices)}"


def show(value: Any) -> str:
    """``value`` as one would write it, cut short."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def one_line(text: object) -> str:
    return " ".join(str(text).split())


def dotted(keys: Sequence[Any]) -> str:
    return ".".join(map(str, keys))


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """The types of a record's fields, by name."""
    types = get_type_hints(cls)
    return {field.name: types[field.name] for field in dataclasses.fields(cls)}


def bare(hint: Any) -> Any:
    """``hint`` without ``| None``."""
    if get_origin(hint) in (Union, UnionType):
        return next(part for part in get_args(hint) if part is not type(None))
    return hint


def type_under(hint: Any, keys: Sequence[Any]) -> Any:
    """The type of what stands at ``keys`` inside a value of type ``hint``; None where nothing may stand."""
    for key in keys:
        hint = bare(hint)
        if dataclasses.is_dataclass(hint):
            hint = hints(hint).get(key)  # type: ignore[arg-type]
        else:
            hint = (*get_args(hint), None)[1 if get_origin(hint) is dict else 0] if get_args(hint) else None
    return hint


def names_under(cls: type, keys: Sequence[Any]) -> list[str]:
    """The keys of the record that stands at ``keys``."""
    record = bare(type_under(cls, keys))
    return [name for name in hints(record) if name != "algorithm_name"] if dataclasses.is_dataclass(record) else []


def records(cls: type, path: str = "") -> Iterator[tuple[str, type]]:
    """Every record in ``cls`` with its dotted path: ("", Config), ("models.<role>", RoleConfig), ..."""
    yield path, cls
    for name, hint in hints(cls).items():
        inner, below = bare(hint), f"{path}.{name}".lstrip(".")
        if get_origin(inner) is dict:
            inner, below = bare(get_args(inner)[1]), f"{below}.<role>"
        if dataclasses.is_dataclass(inner):
            yield from records(inner, below)  # type: ignore[arg-type]


# ---- ranges ---------------------------------------------------------------------------------------------------------

# Interval -> the fields that lie in it, wherever they stand (Class.field where a name means two things). A record may
# instead write Annotated[float, Gt(0)] beside its field.
RANGES = {
    "[0, inf)": """learning_rate warmup_steps weight_decay delay min_new_tokens temperature top_k size samples kl_coef
        entropy_coef missing_eos_penalty centering reward_centering normalize_samples EvalConfig.every
        vocab_size num_kv_heads head_dim mlp_size""",
    "(0, inf)": """clip_norm eps clip_range value_clip_range kl_target stop_kl norm_eps rope_theta low_freq_factor
        high_freq_factor""",
    "[1, inf)": """iterations every samples_every keep prompts_per_step samples_per_prompt sequences_per_step
        preferences_per_step micro_batch_size max_new_tokens prompt_buckets num_epochs num_minibatches kl_horizon
        hidden_size num_layers num_heads max_positions original_max_positions factor""",
    "[2, inf)": "max_length",
    "[259, inf)": "train_vocab_size",
    "[0, 1]": "final_fraction gamma gae_lambda",
    "(0, 1]": "top_p",
    "[0, 1)": "b1 b2",
    "[0, 0.5)": "label_smoothing reward_label_smoothing",
    "[0, 2147483647]": "seed",
}
RANGE_OF = {name: interval for interval, names in RANGES.items() for name in names.split()}


def interval_of(cls: type, name: str) -> str | None:
    """The interval in which the field lies; None where any number will do."""
    return RANGE_OF.get(f"{cls.__name__}.{name}") or RANGE_OF.get(name)


def outside(value: float, interval: str) -> str | None:
    """What to say of a number that isn't in ``interval`` ("[0, 1)"); None of one that is."""
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    below = value < low or (value == low and interval[0] == "(")
    above = value > high or (value == high and interval[-1] == ")")
    if not below and not above:
        return None
    bound, closed = (low, interval[0] == "[") if below else (high, interval[-1] == "]")
    nearest = f"; nearest: {bound:g}" if closed else ""
    return f"{show(value)}: expected a number in {interval}{nearest}"


def check_ranges(record: Any, source: str) -> None:
    """Raises ConfigError for the numbers in ``record`` that are outside their range; ``source`` starts the lines."""
    if problems := [*range_problems(record)]:
        raise ConfigError("\n".join(f"{source}: {dotted(keys)}: {text}" for keys, text in problems))


def range_problems(record: Any, keys: tuple = ()) -> Iterator[tuple[tuple, str]]:
    """(keys, text) of every number in ``record``, and in the records below it, that is outside its range."""
    for field in dataclasses.fields(record):
        value, here = getattr(record, field.name), (*keys, field.name)
        inside = dict(enumerate(value)) if isinstance(value, tuple) else value
        items = [((*here, key), item) for key, item in inside.items()] if isinstance(inside, dict) else [(here, value)]
        for place, item in items:
            if dataclasses.is_dataclass(item):
                yield from range_problems(item, place)
            elif isinstance(item, (int, float)) and not isinstance(item, bool):
                interval = interval_of(type(record), field.name)
                if interval and (text := outside(item, interval)):
                    yield place, text


# ---- does it make sense on these devices? ---------------------------------------------------------------------------

ROLES = ("policy", "value", "reward", "reference", "cost", "q", "target_q")
SECTION_OF = {"prompts": "prompts", "sequences": "demonstrations", "preferences": "preferences"}  # Batch -> data


def check(cfg: Config, num_devices: int, source: str = "config") -> None:
    """Raises ConfigError, a line a mistake, for what no single key shows: roles, data, batch arithmetic, the mesh.

    Nothing is built or read; ``source`` is what the lines start with (the config's path)."""
    problems = [*role_problems(cfg), *data_problems(cfg), *tokenizer_problems(cfg), *evaluation_problems(cfg)]
    problems += [*model_problems(cfg), *device_problems(cfg, num_devices)]
    if problems:
        raise ConfigError("\n".join(f"{source}: {problem}" for problem in problems))


def role_problems(cfg: Config) -> Iterator[str]:
    """Every role that is needed has one origin, and no origin goes round in a circle."""
    needed, name = roles_of(cfg), cfg.algorithm_name
    for role in needed:
        if role not in cfg.models:
            yield f"models.{role}: missing; {name} needs it; expected init_from or architecture"
    for role, model in cfg.models.items():
        if role not in needed and role not in ROLES:
            yield f"models.{role}: unknown role; {suggest(role, needed)}"
        if model.init_from is None and model.architecture is None:
            yield f"models.{role}: neither init_from nor architecture is given; expected one of them"
        elif model.init_from is not None and model.architecture is not None:
            yield f"models.{role}: init_from {model.init_from} and architecture are both given; expected one of them"
        elif model.init_from in {*ROLES, *cfg.models}:
            yield from origin_problems(cfg, role)
    for role in cfg.optimizer:
        if role != "default" and role not in needed:
            yield f"optimizer.{role}: no role of {name}; {suggest(role, ['default', *needed])}"


def origin_problems(cfg: Config, role: Role) -> Iterator[str]:
    """Follows init_from from role to role."""
    path = [role]
    while (origin := cfg.models[path[-1]].init_from) in {*ROLES, *cfg.models}:
        where = f"models.{role}.init_from: {cfg.models[role].init_from}"
        if origin not in cfg.models:
            if len(path) == 1:
                others = [other for other in cfg.models if other != role]
                yield f"{where}: a role that models does not give; {suggest(origin, others)}"
            return
        if origin in path:
            if role == min(path) == origin:  # once a circle
                yield f"{where}: goes in a circle ({' -> '.join([*path, origin])}); expected one that ends at weights"
            return
        path.append(origin)


def data_problems(cfg: Config) -> Iterator[str]:
    """What the algorithm reads is given, each source as one thing, and lengths make sense."""
    name, data, generate = cfg.algorithm_name, cfg.data, cfg.generate
    for section in sections_read(cfg):
        if getattr(data, section, None) is None:
            yield f"data.{section}: missing; {name} reads it; expected path or tfds"
    sources = {f"data.{name}": getattr(data, name) for name in hints(DataConfig)} | {"eval.judge": cfg.eval.judge}
    for key, given in sources.items():
        if isinstance(given, SourceConfig) and (given.path is None) == (given.tfds is None):
            yield f"{key}: path is {show(given.path)} and tfds is {show(given.tfds)}; expected one of them"
    if list(data.prompt_buckets) != sorted(set(data.prompt_buckets)) or not data.prompt_buckets:
        nearest = sorted(set(data.prompt_buckets)) or [64, 128, 256]
        yield f"data.prompt_buckets: {show(data.prompt_buckets)}: expected ascending lengths; nearest: {nearest}"
    if generate.min_new_tokens > generate.max_new_tokens:
        most = generate.max_new_tokens
        yield f"generate.min_new_tokens: {generate.min_new_tokens}: more than max_new_tokens; nearest: {most}"
    if getattr(cfg.algorithm, "normalize_samples", 0) and "policy" not in cfg.models:
        yield "models.policy: missing; algorithm.normalize_samples scores its responses; expected init_from"


def evaluation_problems(cfg: Config) -> Iterator[str]:
    """An evaluation that is asked for can be made."""
    best, sections = cfg.checkpoint.best, sections_read(cfg)
    if cfg.eval.every and not any(getattr(cfg.data, f"eval_{section}", None) for section in sections):
        yield f"data.eval_{sections[0]}: missing; eval.every is {cfg.eval.every}; expected path or tfds"
    if best and not best.startswith("eval/"):
        yield f"checkpoint.best: {best}: expected a metric of the evaluation; nearest: eval/{best}"
    if best and not cfg.eval.every:
        yield f"checkpoint.best: {best}: never measured, as eval.every is 0; expected eval.every of 1 or more"


def tokenizer_problems(cfg: Config) -> Iterator[str]:
    """The tokenizer has exactly one origin."""
    tokenizer, size = cfg.tokenizer, cfg.tokenizer.train_vocab_size
    if size and tokenizer.init_from:
        yield f"tokenizer.train_vocab_size: {size}: init_from {tokenizer.init_from} is given too; expected one of them"
    elif size and cfg.data.demonstrations is None:
        yield f"tokenizer.train_vocab_size: {size}: there is no text to train on; expected data.demonstrations"
    from_scratch = all(model.init_from in {None, *cfg.models} for model in cfg.models.values())
    if from_scratch and not size and not tokenizer.init_from:
        yield "tokenizer: null: no model is given that has one; expected init_from or train_vocab_size"


def model_problems(cfg: Config) -> Iterator[str]:
    """Architectures whose heads divide, and which are long enough for the rows."""
    longest, what = cfg.data.max_length, "data.max_length"
    if "prompts" in fields_read(cfg):
        longest = max(cfg.data.prompt_buckets, default=0) + cfg.generate.max_new_tokens
        what = f"the largest of data.prompt_buckets + generate.max_new_tokens {cfg.generate.max_new_tokens}"
    for role, shape in architectures(cfg):
        key = f"models.{role}.architecture"
        try:
            resolve(shape)
        except ValueError as error:
            yield f"{key}.{error}"
        if not shape.head_dim and shape.hidden_size % shape.num_heads:
            nearest = min(divisors(shape.hidden_size), key=lambda heads: abs(heads - shape.num_heads))
            wrong = f"{shape.num_heads}: does not divide hidden_size {shape.hidden_size}"
            yield f"{key}.num_heads: {wrong}; nearest: {nearest}"
        if shape.max_positions < longest:
            yield f"{key}.max_positions: {shape.max_positions}: less than {longest} = {what}; nearest: {longest}"


def device_problems(cfg: Config, num_devices: int) -> Iterator[str]:
    """The mesh fits the devices, and rows and models divide over the mesh."""
    try:
        sizes: dict[str, int] = dict(zip(AXES, mesh_shape(cfg.mesh, num_devices), strict=True))
    except ValueError as error:
        yield str(error)
        return
    yield from batch_problems(cfg, sizes)
    for role, shape in architectures(cfg):
        for name, axis in (("num_heads", "tensor"), ("mlp_size", "tensor"), ("hidden_size", "fsdp")):
            value = getattr(shape, name)
            if value and value % sizes[axis]:
                key, nearest = f"models.{role}.architecture.{name}", nearest_multiple(value, sizes[axis])
                yield f"{key}: {value}: mesh axis {axis} of {sizes[axis]} does not divide it; nearest: {nearest}"


def batch_problems(cfg: Config, sizes: Mapping[str, int]) -> Iterator[str]:
    """Rows divide into minibatches, micro-batches and shards; ``sizes``: devices along each mesh axis."""
    axes = [axis for axis in AXES if axis in (RULES["batch"] or ())]
    shards, (_, minibatches) = math.prod(sizes[axis] for axis in axes), updates_of(cfg)
    over = f"{minibatches} minibatches x {shards} batch shards ({' x '.join(f'{axis} {sizes[axis]}' for axis in axes)})"
    undivided = [*divided(cfg, fields_read(cfg), minibatches, shards, over)]
    yield from undivided
    micro = cfg.batch.micro_batch_size
    if undivided or micro is None:
        return
    main, *others = fields_read(cfg)
    rows = rows_of(cfg)[main]
    fits = [size for size in divisors(rows // minibatches) if size % shards == 0]
    if micro not in fits:
        nearest = min(fits, key=lambda size: abs(size - micro))
        yield (
            f"batch.micro_batch_size: {micro}: a minibatch has {rows} / {minibatches} = {rows // minibatches} rows "
            f"on {shards} batch shards; expected a divisor of it that the shards divide; nearest: {nearest}"
        )
        return
    parts = rows // minibatches // micro
    yield from divided(cfg, others, minibatches * parts, shards, f"{over} x {parts} micro-batches")


def divided(cfg: Config, fields: Sequence[str], parts: int, shards: int, over: str) -> Iterator[str]:
    """What to say of the fields' rows where ``parts`` parts on ``shards`` shards do not divide them."""
    for field in fields:
        key, each = ROWS_KEY[field], cfg.batch.samples_per_prompt if field == "prompts" else 1
        count = getattr(cfg.batch, key)
        # prompts lie on the shards themselves, before each of them becomes several rows
        unit = math.lcm(parts * shards // math.gcd(parts * shards, each), shards)
        if count % unit:
            rows = f"{count} prompts x {each} samples = {count * each} rows" if each > 1 else f"{count} rows"
            yield f"batch.{key}: {count}: {rows} do not divide over {over}; nearest: {nearest_multiple(count, unit)}"


ROWS_KEY = {"prompts": "prompts_per_step", "sequences": "sequences_per_step", "preferences": "preferences_per_step"}


def fields_read(cfg: Config) -> tuple[str, ...]:
    """The fields of Batch that the algorithm reads from data."""
    return find_algorithm(cfg.algorithm_name).batch(cfg.algorithm)


def sections_read(cfg: Config) -> list[str]:
    """The sections of ``data`` that hold them."""
    return [SECTION_OF.get(field, field) for field in fields_read(cfg)]


def rows_of(cfg: Config) -> dict[str, int]:
    """Rows of one iteration, for each field of Batch that the algorithm reads."""
    rows = {field: getattr(cfg.batch, ROWS_KEY[field]) for field in fields_read(cfg)}
    if "prompts" in rows:
        rows["prompts"] *= cfg.batch.samples_per_prompt
    return rows


def updates_of(cfg: Config) -> tuple[int, int]:
    """(epochs, minibatches) of one iteration; their product is its optimizer steps."""
    return getattr(cfg.algorithm, "num_epochs", 1), getattr(cfg.algorithm, "num_minibatches", 1)


def num_micro(cfg: Config) -> int:
    """Parts that a minibatch is computed in."""
    minibatch = next(iter(rows_of(cfg).values())) // updates_of(cfg)[1]
    return minibatch // (cfg.batch.micro_batch_size or minibatch)


def describe_batch(cfg: Config) -> str:
    """The batch arithmetic in one line, for the start of a run."""
    (epochs, minibatches), parts, rows = updates_of(cfg), num_micro(cfg), rows_of(cfg)
    (field, count), *others = rows.items()
    each = cfg.batch.samples_per_prompt
    start = f"{count // each} prompts x {each} samples = {count} rows" if field == "prompts" else f"{count} {field}"
    more = "".join(f" with {number} {name}" for name, number in others)
    size = count // minibatches
    updates = f"{epochs} epochs x {minibatches} minibatches of {size} = {epochs * minibatches} updates an iteration"
    return f"batch: {start}{more} -> {updates}; micro-batches of {size // parts} ({parts} a minibatch)"


def architectures(cfg: Config) -> list[tuple[Role, ModelConfig]]:
    """The roles that start from random weights, with their shapes."""
    return [(role, model.architecture) for role, model in cfg.models.items() if model.architecture]


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def nearest_multiple(number: int, unit: int) -> int:
    return max(unit, round(number / unit) * unit)


# ---- the reference --------------------------------------------------------------------------------------------------


def reference() -> str:
    """The reference of all keys in markdown, from the dataclasses and the comments beside their fields."""
    places: dict[type, list[str]] = {}
    for path, record in records(Config):
        places.setdefault(record, []).append(path)
    run, *sections = [reference_of(paths, record) for record, paths in places.items()]
    algorithms = [reference_of([f"algorithm, name: {name}"], row.config) for name, row in sorted(ALGORITHMS.items())]
    return "\n".join([run, *algorithms, *sections])


def reference_of(paths: list[str], record: type) -> str:
    """One record as where it stands, its docstring's first paragraph, and a table."""
    intro = one_line(inspect.getdoc(record).split("\n\n")[0])  # type: ignore[union-attr]
    comments = field_comments(record)
    rows = []
    for field in dataclasses.fields(record):
        if record is Config and (dataclasses.is_dataclass(bare(hints(record)[field.name])) or field.name in SECTIONS):
            continue
        cells = (f"`{field.name}`", type_name(hints(record)[field.name]), default_of(field), comments[field.name])
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    table = ["| key | type | default | |", "|---|---|---|---|", *rows] if rows else ["No keys."]
    where = ", ".join(f"`{path}`" for path in paths if path) or "The run"
    return "\n".join([f"**{where}**: {intro}", "", *table, ""])


SECTIONS = ("algorithm", "algorithm_name", "models", "optimizer")  # explained by the tables of what is in them


def field_comments(record: type) -> dict[str, str]:
    """The comment that ends each field's lines in the source; "" where there is none."""
    source = textwrap.dedent(inspect.getsource(record))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    by_line = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    fields = [node for node in body.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    return {node.target.id: by_line.get(node.end_lineno or 0, "") for node in fields}  # type: ignore[union-attr]


def type_name(hint: Any) -> str:
    """A type in words: "text", "integer or null", "`max` or `min`"."""
    inner = bare(hint)
    null = " or null" if inner is not hint else ""
    names = {int: "integer", float: "number", bool: "true or false", str: "text", Any: "section"}
    if get_origin(inner) is Literal:
        return " or ".join([f"`{choice}`" for choice in get_args(inner)]) + null
    if get_origin(inner) in (tuple, list):
        return f"list of {type_name(get_args(inner)[0])}{null}"
    if get_origin(inner) is dict or dataclasses.is_dataclass(inner):
        return f"section{null}"
    return names.get(inner, str(inner)) + null


def default_of(field: dataclasses.Field) -> str:
    """The default as YAML has it."""
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return "required"
    value = field.default_factory() if field.default is dataclasses.MISSING else field.default  # type: ignore[misc]
    return f"`{json.dumps(value)}`"


if __name__ == "__main__":
    print(reference())
