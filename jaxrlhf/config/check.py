"""Does a config make sense on these devices? What no single key shows: roles, data, batch arithmetic, the mesh."""

import math
from collections.abc import Iterator, Mapping, Sequence

from jaxrlhf.config.adapters import adapter_problems, quantization_problems
from jaxrlhf.config.batch import divisors, longest_row, rows_of, rows_taken
from jaxrlhf.config.environment import environment_problems
from jaxrlhf.config.field_types import hints
from jaxrlhf.config.members import grader_of, members_in, numbering_problems
from jaxrlhf.config.places import place_problems
from jaxrlhf.config.record import Config
from jaxrlhf.config.resolved import Resolved, resolve_config
from jaxrlhf.config.roles import graders_of
from jaxrlhf.config.rollouts import ahead_problems, rollout_problems
from jaxrlhf.config.strict import suggest
from jaxrlhf.data.chat import check_config
from jaxrlhf.data.record_kinds import DataKind
from jaxrlhf.data.sources import DataConfig, SourceConfig
from jaxrlhf.errors import ConfigError, counted, show
from jaxrlhf.log.bars import bar_problems
from jaxrlhf.log.run_dir import is_local
from jaxrlhf.models.config import MLP, ModelConfig, resolve
from jaxrlhf.optim import LARGEST_B1_IN_BFLOAT16
from jaxrlhf.rewards.graders import gold_graders, grader_problems
from jaxrlhf.sharding import AXES, mesh_shape
from jaxrlhf.types import Role

CRITICS = ("value", "cost_value")
ROLES = ("policy", *CRITICS, "reward", "reference", "cost", "q", "target_q", "gold")
# what of a model some mesh axes must divide; heads need not be
SPLIT = {
    "mlp_size": ("decode", "tensor"),
    "shared_expert_size": ("decode", "tensor"),  # 0 where there is none
    "expert_size": ("decode", "tensor"),
    "hidden_size": ("fsdp", "decode", "expert", "context"),
    "num_experts": ("expert",),  # 0 where there are none, which any number divides
}


def check(cfg: Config, num_devices: int, source: str = "config", place: str = "here") -> Resolved:
    """The config resolved. Raises ConfigError, a line a mistake, for what no single key shows: roles, data, batch
    arithmetic, the mesh.

    Nothing is built or read, but for the module of rewards.function, which is imported; ``source`` is what the lines
    start with (the config's path), ``place`` where the devices are ("in the slice")."""
    found = resolve_config(cfg)
    problems = [*role_problems(found), *reward_problems(found), *data_problems(found), *generate_problems(found)]
    problems += [*tokenizer_problems(cfg), *evaluation_problems(found), *model_problems(found)]
    problems += [
        *environment_problems(found),
        *rollout_problems(found),
        *ahead_problems(found),
        *place_problems(cfg),
        *profile_problems(cfg),
        *alarm_problems(cfg),
        *bar_problems(cfg.bars),
        *device_problems(found, num_devices, place),
        *([*adapter_problems(cfg, found.roles), *quantization_problems(cfg, found.roles)] if not problems else ()),
    ]
    if problems:
        raise ConfigError("\n".join(f"{source}: {problem}" for problem in problems))
    return found


def role_problems(resolved: Resolved) -> Iterator[str]:
    """Every role that is needed has one origin, and no origin goes round in a circle."""
    cfg, needed, name = resolved.cfg, [*resolved.roles.heads], resolved.cfg.algorithm_name
    for role in needed:
        if role not in cfg.models:
            yield f"models.{role}: missing; {name} needs it; expected init_from or architecture"
    for role, model in cfg.models.items():
        if role not in needed and grader_of(role) not in ROLES:
            yield f"models.{role}: unknown role; {suggest(role, needed)}"
        if model.init_from is None and model.architecture is None:
            yield f"models.{role}: neither init_from nor architecture is given; expected one of them"
        elif model.init_from is not None and model.architecture is not None:
            yield f"models.{role}: init_from {model.init_from} and architecture are both given; expected one of them"
        elif model.init_from in {*ROLES, *cfg.models}:
            yield from origin_problems(cfg, role)
        yield from trunk_problems(resolved, role)
        yield from routing_problems(resolved, role)
    yield from numbering_problems(cfg.models)
    yield from optimizer_problems(cfg, needed)


def optimizer_problems(cfg: Config, needed: list[Role]) -> Iterator[str]:
    """Rows of ``optimizer`` are of roles that are needed, keep moments that can move, and have no key that does
    nothing."""
    for role, row in cfg.optimizer.items():
        for key in ("b1", "momentum"):
            if row.dtype == "bfloat16" and (value := getattr(row, key)) > LARGEST_B1_IN_BFLOAT16:
                yield (
                    f"optimizer.{role}.{key}: {show(value)}: dtype bfloat16 is too coarse for a first moment that "
                    f"moves so little; expected dtype float32, or {key} of at most {LARGEST_B1_IN_BFLOAT16}; "
                    f"nearest: {LARGEST_B1_IN_BFLOAT16}"
                )
        for key in ("momentum", "newton_schulz_steps"):
            if row.name != "muon" and (value := getattr(row, key)) != (default := getattr(type(row), key)):
                wrong = f"optimizer.{role}.{key}: {show(value)}: a key of muon, and name is {row.name}"
                yield f"{wrong}; expected {show(default)}"
        if role != "default" and role not in {*needed, *map(grader_of, needed)}:
            yield f"optimizer.{role}: no role of {cfg.algorithm_name}; {suggest(role, ['default', *needed])}"


def alarm_problems(cfg: Config) -> Iterator[str]:
    """An alarm that stops the run has a threshold."""
    for name in cfg.alarms.stop:
        if getattr(cfg.alarms, name) is None:
            yield f"alarms.stop: {name}: alarms.{name} is null, so it never tells; expected a number there"


def trunk_problems(resolved: Resolved, role: Role) -> Iterator[str]:
    """What the algorithm puts on a trunk stays there; else only a value model shares one, and only the policy's."""
    model, trained, name = resolved.cfg.models[role], resolved.roles.trained, resolved.cfg.algorithm_name
    where, default = f"models.{role}.share_trunk: true", type(model).trunk_gradient
    if (spec := resolved.roles.declared.get(role)) is not None:
        if not model.share_trunk or model.init_from != spec.trunk:
            yield (
                f"models.{role}: {name} has it as a head on the {spec.trunk}; expected init_from "
                f"{spec.trunk} and share_trunk true, or nothing"
            )
    elif not model.share_trunk:
        if model.trunk_gradient != default:
            wrong = f"{show(model.trunk_gradient)}: share_trunk is false, so there is no such gradient"
            yield f"models.{role}.trunk_gradient: {wrong}; nearest: {show(default)}"
    elif grader_of(role) != role and role in trained:
        first = members_in(trained, grader_of(role))[0]
        if model.init_from != first or role == first or resolved.cfg.models[first].share_trunk:
            yield f"{where}: init_from {model.init_from}: expected {first}, a model of its own, from another member"
    elif role not in CRITICS or role not in trained:
        yield f"{where}: only a value model that learns beside the policy shares its trunk; expected false"
    elif model.init_from != "policy" or trained.get("policy") != "lm":
        start = f"init_from {model.init_from}" if model.init_from else "an architecture of its own"
        yield f"{where}: {start} is given; expected init_from policy, whose trunk it is"


def routing_problems(resolved: Resolved, role: Role) -> Iterator[str]:
    """Only what samples and learns follows the routing of samples, and only what learns has a loss of its routers."""
    model, trained, name = resolved.cfg.models[role], resolved.roles.trained, resolved.cfg.algorithm_name
    where = f"models.{role}.replay_routing: true"
    if model.replay_routing and (role != "policy" or not resolved.algorithm.online):
        yield f"{where}: only a policy that {name} samples from keeps its routing; expected false"
    elif model.replay_routing and (resolved.cfg.acts or resolved.cfg.converses):
        yield f"{where}: the routing of an environment's turns is not kept; expected false"
    for key in ("router_aux_loss_coef", "router_z_loss_coef"):
        if (value := getattr(model, key)) and role not in trained:
            yield f"models.{role}.{key}: {show(value)}: {role} does not learn; expected 0.0"


def reward_problems(resolved: Resolved) -> Iterator[str]:
    """Reward functions can be found, have something to score, and no reward model scores beside them."""
    cfg, algorithm = resolved.cfg, resolved.algorithm
    name, rewards = cfg.algorithm_name, cfg.rewards
    if rewards.combine != type(rewards).combine and not graders_of(cfg):
        yield f"rewards.combine: {rewards.combine}: there is no ensemble; expected mean, or a list under models.reward"
    if rewards.normalize != "sum_then_group":
        yield from apart_problems(resolved)
    if not rewards.on_host:
        yield from grader_problems(rewards)
        return
    given, shown = ("functions", ", ".join(rewards.functions)) if rewards.functions else ("function", rewards.function)
    if not algorithm.online:
        expected = "{}" if rewards.functions else "null"
        yield f"rewards.{given}: {shown}: {name} samples no responses to score; expected {expected}"
        return
    if (members := members_in(cfg.models, "reward"))[0] in cfg.models:
        yield f"models.{members[0]}: rewards.{given} {shown} is given too; expected one of them"
    if "cost" in rewards.functions and (costs := members_in(cfg.models, "cost"))[0] in cfg.models:
        yield f"models.{costs[0]}: rewards.functions.cost is given too; expected one of them"
    if "reward" in algorithm.roles(cfg.algorithm)[0]:
        expected = "{}" if rewards.functions else "null"
        yield f"rewards.{given}: {shown}: no model that can learn, and {name} trains one; expected {expected}"
    yield from grader_problems(rewards)


def apart_problems(resolved: Resolved) -> Iterator[str]:
    """There are several reward functions, an algorithm that compares each of them, and nothing taken off their sum."""
    cfg, where = resolved.cfg, f"rewards.normalize: {resolved.cfg.rewards.normalize}"
    if not cfg.rewards.functions:
        yield f"{where}: there are no rewards.functions to normalise; expected sum_then_group"
    elif not resolved.algorithm.graders_apart:
        yield f"{where}: {cfg.algorithm_name} compares the scores alone; expected sum_then_group, or grpo"
    elif penalty := getattr(cfg.algorithm, "missing_eos_penalty", 0.0):
        expected = "expected 0.0, and a function for it (soft_overlong)"
        yield f"algorithm.missing_eos_penalty: {penalty:g}: it is taken off a sum, and {where}; {expected}"
    elif getattr(cfg.algorithm, "kl_in", "loss") == "score":
        yield f"algorithm.kl_in: score: it is taken off a sum, and {where}; expected loss or rewards"
    elif getattr(cfg.algorithm, "advantages", "") == "none":
        yield f"{where}: advantages is none, so no group is compared; expected sum_then_group, or advantages mean_std"


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


def data_problems(resolved: Resolved) -> Iterator[str]:
    """What the algorithm reads is given, each source as one thing, and lengths make sense."""
    cfg, name, data = resolved.cfg, resolved.cfg.algorithm_name, resolved.cfg.data
    for section in sections_read(resolved):
        if cfg.acts and section == "prompts":
            continue  # episodes start from environment.starts seeds
        if getattr(data, section, None) is None:
            yield f"data.{section}: missing; {name} reads it; expected path, tfds or hf"
    for kind in resolved.kinds:
        if (count := rows_taken(cfg, kind)) < (least := kind.least_rows):
            wrong = f"batch.{kind.rows_key}: {count}: {name} needs responses of other rows"
            yield f"{wrong}; expected {least} or more; nearest: {least}"
    sources = {f"data.{name}": getattr(data, name) for name in hints(DataConfig)} | {"eval.judge": cfg.eval.judge}
    for key, given in sources.items():
        if isinstance(given, SourceConfig) and (wrong := given.wrong_origin()):
            yield f"{key}: {wrong}"
    if data.chat is not None:
        try:
            check_config(data.chat)
        except ValueError as error:
            yield str(error)
    if list(data.prompt_buckets) != sorted(set(data.prompt_buckets)) or not data.prompt_buckets:
        nearest = sorted(set(data.prompt_buckets)) or [64, 128, 256]
        yield f"data.prompt_buckets: {show(data.prompt_buckets)}: expected ascending lengths; nearest: {nearest}"
    yield from (f"algorithm.{problem}" for problem in resolved.algorithm.problems(cfg.algorithm))
    if resolved.algorithm.finish(cfg.algorithm) and "policy" not in cfg.models:
        yield f"models.policy: missing; {name} normalises scores of its responses at the end; expected init_from"


def generate_problems(resolved: Resolved) -> Iterator[str]:
    """Responses can be as long as asked for; training has a distribution to sample them from, and enough of them."""
    cfg, algorithm = resolved.cfg, resolved.algorithm
    generate, name, samples = cfg.generate, cfg.algorithm_name, cfg.batch.samples_per_prompt
    if generate.min_new_tokens > generate.max_new_tokens:
        most = generate.max_new_tokens
        yield f"generate.min_new_tokens: {generate.min_new_tokens}: more than max_new_tokens; nearest: {most}"
    if generate.temperature == 0 and algorithm.online:
        default = type(generate).temperature
        yield (
            f"generate.temperature: {show(generate.temperature)}: greedy, and {name} learns from the probabilities of "
            f"what it samples; expected more than 0; nearest: {show(default)}"
        )
    if generate.beta > 0 and (algorithm.online or not resolved.roles.guides):
        why = "learns from what its policy samples alone" if algorithm.online else "has no action values to guide it"
        yield f"generate.beta: {show(generate.beta)}: {name} {why}; expected 0"
    if samples < (least := algorithm.min_samples(cfg.algorithm)):
        yield (
            f"batch.samples_per_prompt: {samples}: {name} compares the responses to a prompt with each other; "
            f"expected {least} or more; nearest: {least}"
        )


def evaluation_problems(resolved: Resolved) -> Iterator[str]:
    """An evaluation that is asked for can be made."""
    cfg, sections = resolved.cfg, sections_read(resolved)
    best = cfg.checkpoint.best
    if cfg.eval.gold:
        if "gold" in cfg.models:
            yield f"eval.gold: {cfg.eval.gold}: models.gold is given too; expected one of them"
        try:
            gold_graders(cfg.eval.gold)
        except ValueError as error:
            yield str(error)
    sections += ["prompts"] if "policy" in resolved.roles.trained and "prompts" not in sections else []
    if cfg.eval.every and not any(getattr(cfg.data, f"eval_{section}", None) for section in sections):
        yield f"data.eval_{sections[0]}: missing; eval.every is {cfg.eval.every}; expected path, tfds or hf"
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
    if from_scratch and not size and not tokenizer.init_from and not cfg.acts:
        yield "tokenizer: null: no model is given that has one; expected init_from or train_vocab_size"


def model_problems(resolved: Resolved) -> Iterator[str]:
    """Architectures whose heads divide, and which are long enough for the rows."""
    longest, what = longest_row(resolved)
    for role, shape in architectures(resolved.cfg):
        key = f"models.{role}.architecture"
        if shape.family != MLP and not shape.head_dim and shape.hidden_size % shape.num_heads:
            nearest = min(divisors(shape.hidden_size), key=lambda heads: abs(heads - shape.num_heads))
            wrong = f"{shape.num_heads}: does not divide hidden_size {shape.hidden_size}"
            yield f"{key}.num_heads: {wrong}; nearest: {nearest}"
        else:
            try:
                resolve(shape)
            except ValueError as error:
                yield f"{key}.{error}"
        if shape.family != MLP and shape.max_positions < longest:
            yield f"{key}.max_positions: {shape.max_positions}: less than {longest} = {what}; nearest: {longest}"


def profiled_steps(text: str | None) -> range:
    """The steps that ``profile`` names, counted as the log counts them. Raises ValueError where it names none."""
    if text is None:
        return range(0)
    first, colon, end = text.partition(":")
    if not (colon and first.isdecimal() and end.isdecimal() and 1 <= int(first) < int(end)):
        raise ValueError('expected FIRST:END with 1 <= FIRST < END, as in "10:13" for steps 10, 11 and 12')
    return range(int(first), int(end))


def profile_problems(cfg: Config) -> Iterator[str]:
    """The steps to trace are steps of the run, and a trace can be written."""
    try:
        steps = profiled_steps(cfg.profile)
    except ValueError as error:
        yield f"profile: {show(cfg.profile)}: {error}"
        return
    last = cfg.iterations
    if steps and last is not None and steps[-1] > last:
        nearest = f"{min(steps[0], last)}:{last + 1}"
        yield f"profile: {show(cfg.profile)}: the run has {last} iterations; nearest: {show(nearest)}"
    if steps and not is_local(cfg.run_dir):
        where = f"a trace can't be written to {cfg.run_dir}"
        yield f"profile: {show(cfg.profile)}: {where}; expected null or a local run_dir"


def device_problems(resolved: Resolved, num_devices: int, place: str) -> Iterator[str]:
    """The mesh fits the devices, and rows and models divide over the mesh."""
    cfg = resolved.cfg
    try:
        sizes: dict[str, int] = dict(zip(AXES, mesh_shape(cfg.mesh, num_devices, place), strict=True))
    except ValueError as error:
        yield str(error)
        return
    yield from batch_problems(resolved, sizes)
    for role, shape in architectures(cfg):
        for name, keys in SPLIT.items():
            value, (axes, devices) = getattr(shape, name), split_by(keys, sizes)
            if value % devices:
                key, nearest = f"models.{role}.architecture.{name}", nearest_multiple(value, devices)
                yield f"{key}: {value}: {axes} of {devices} does not divide it; nearest: {nearest}"


def split_by(keys: Sequence[str], sizes: Mapping[str, int]) -> tuple[str, int]:
    """Which of the mesh axes split something, and over how many devices; pmap's mesh has none of them."""
    real = [key for key in keys if sizes.get(key, 1) > 1]
    return f"mesh.{' x '.join(real)}", math.prod(sizes[key] for key in real)


def batch_problems(resolved: Resolved, sizes: Mapping[str, int]) -> Iterator[str]:
    """Rows divide into minibatches, micro-batches and shards; ``sizes``: devices along each mesh axis."""
    axes = {"slices": sizes["slice"], "data": sizes["data"], "fsdp": sizes["fsdp"] * sizes["decode"]}
    axes["expert"] = sizes["expert"]
    cfg, shards, minibatches = resolved.cfg, math.prod(axes.values()), resolved.updates.minibatches
    shown = " x ".join(f"{axis} {size}" for axis, size in axes.items() if axis in ("data", "fsdp") or size > 1)
    over = f"{counted(minibatches, 'minibatch', 'minibatches')} x {counted(shards, 'batch shard')} ({shown})"
    main, *others = resolved.kinds
    undivided = [*divided(cfg, [main, *others], minibatches, shards, over, sizes["context"])]
    yield from undivided
    micro = cfg.batch.micro_batch_size
    if undivided or micro is None:
        return
    rows = rows_of(resolved)[main.field]
    fits = [size for size in divisors(rows // minibatches) if size % shards == 0]
    if micro not in fits:
        nearest = min(fits, key=lambda size: abs(size - micro))
        yield (
            f"batch.micro_batch_size: {micro}: a minibatch has {rows} / {minibatches} = {rows // minibatches} rows "
            f"on {counted(shards, 'batch shard')}; expected a divisor of it that the shards divide; nearest: {nearest}"
        )
        return
    parts = rows // minibatches // micro
    yield from divided(
        cfg, others, minibatches * parts, shards, f"{over} x {counted(parts, 'micro-batch', 'micro-batches')}"
    )


def divided(
    cfg: Config, kinds: Sequence[DataKind], parts: int, shards: int, over: str, context: int = 1
) -> Iterator[str]:
    """What to say of the kinds' rows where ``parts`` parts on ``shards`` shards do not divide them, and of prompts that
    the ``context`` devices of each shard do not, which share them while responses are sampled."""
    for kind in kinds:
        key, each = kind.rows_key, cfg.batch.samples_per_prompt if kind.is_prompt else 1
        count = rows_taken(cfg, kind)
        # prompts lie on the shards themselves, before each of them becomes several rows
        unit = math.lcm(parts * shards // math.gcd(parts * shards, each), shards * (context if kind.is_prompt else 1))
        if count % unit:
            most = f"{over} x context {context} while responses are sampled" if context > 1 and kind.is_prompt else over
            rows = f"{count} prompts x {each} samples = {count * each} rows" if each > 1 else f"{count} rows"
            yield f"batch.{key}: {count}: {rows} do not divide over {most}; nearest: {nearest_multiple(count, unit)}"


def sections_read(resolved: Resolved) -> list[str]:
    """The sections of ``data`` that the algorithm reads."""
    return [kind.name for kind in resolved.kinds]


def architectures(cfg: Config) -> list[tuple[Role, ModelConfig]]:
    """The roles that start from random weights, with their shapes."""
    return [(role, model.architecture) for role, model in cfg.models.items() if model.architecture]


def nearest_multiple(number: int, unit: int) -> int:
    return max(unit, round(number / unit) * unit)
