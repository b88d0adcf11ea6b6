"""From a Config to everything that a run needs: models, tokenizer, the step's recipe, the initial state."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from jaxrlhf import generate
from jaxrlhf.algorithms import find
from jaxrlhf.config.batch import choose_parts, divisors, kept_together, longest_row, shares_prompts, updates_of
from jaxrlhf.config.check import SPLIT, split_by
from jaxrlhf.config.record import Config
from jaxrlhf.config.roles import roles_of, trunks_of
from jaxrlhf.data import chat
from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.data.sources import open_source
from jaxrlhf.errors import ConfigError
from jaxrlhf.hosts.processes import agree, is_main
from jaxrlhf.log.run_dir import split_step
from jaxrlhf.models import nets, transformer
from jaxrlhf.models.attention.kernels import choose, hardware_of, passed_over
from jaxrlhf.models.config import ModelConfig, resolve, row_limit
from jaxrlhf.models.files import hf, hf_config, hf_folder, hf_tensors
from jaxrlhf.models.transformer import Runtime
from jaxrlhf.ops.sampling import Sampling
from jaxrlhf.optim import make_optimizer, make_schedule
from jaxrlhf.rewards.graders import Graders, find_graders
from jaxrlhf.run import checkpoint, state
from jaxrlhf.run.epochs import with_iterations
from jaxrlhf.run.origins import Weights, base_role, check_loaded, check_tokenizers, origin
from jaxrlhf.sharding import batch_shards, make_mesh, whole
from jaxrlhf.step import Recipe
from jaxrlhf.types import Algorithm, Head, Nets, Params, Prompts, Role, Sequences, TrainState


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """A config made ready as far as shapes go: all that its programs are compiled from."""

    cfg: Config
    algorithm: Algorithm
    mesh: jax.sharding.Mesh
    weights: dict[Role, Weights]
    heads: dict[Role, Head]  # trained roles first
    recipe: Recipe
    sampler: generate.Sampler

    @property
    def configs(self) -> dict[Role, ModelConfig]:
        return {role: found.config for role, found in self.weights.items()}

    def dtype_of(self, role: Role):
        """Number format of the role's stored weights: precision.params, but float32 where the role learns: in bfloat16
        an update of less than a 256th of a weight rounds to nothing, and so does Adam's second moment."""
        return jnp.dtype("float32" if role in self.recipe.optimizers else self.cfg.precision.params)


@dataclasses.dataclass(frozen=True)
class Run(Blueprint):
    """A config made ready to train. Use it under ``sharding.current(run.mesh)``."""

    tokenizer: Any  # a transformers fast tokenizer
    graders: Graders | None  # functions that score on the host; None: the reward model scores, or nothing is sampled
    recognised: dict[str, str] = dataclasses.field(default_factory=dict)  # section of data -> what its rows are


def build(cfg: Config, devices: list | None = None, keep: bool = True) -> Run:
    """Find weights and tokenizer, count the rows where the config gives epochs, and compose the step. Reads no weights;
    raises ConfigError for what does not fit. ``keep``: the tokenizer is saved in the run directory."""
    graders = located(find_graders, cfg.rewards, "rewards")
    mesh = make_mesh(cfg.mesh, devices)
    tokenizer = find_tokenizer(cfg)
    heads = heads_of(cfg)
    weights = {role: find_weights(cfg, role, len(tokenizer), head) for role, head in heads.items()}
    check_loaded(cfg, weights, heads, roles_of(cfg)[0])
    tokenizers.forbid(tokenizer, foreign_tokens(cfg, weights, tokenizer))
    sampler = make_sampler(cfg, tokenizer, weights)
    tokenizer.endings = sampler.eos_ids  # saved with it: what starts from this run ends responses as it does
    cfg = with_iterations(cfg, tokenizer, sampler.eos_ids)
    drawn = draw(cfg, mesh, weights, sampler)
    if keep:
        keep_tokenizer(cfg, tokenizer)
    return Run(**vars(drawn), tokenizer=tokenizer, graders=graders)


def draw(cfg: Config, mesh: jax.sharding.Mesh, weights: dict[Role, Weights], sampler: generate.Sampler) -> Blueprint:
    """Compose the step for models of these shapes. Raises ConfigError where they do not fit the mesh or the rows."""
    check_shapes(cfg, weights, mesh)
    algorithm, (trained, _) = find(cfg.algorithm_name), roles_of(cfg)
    epochs, minibatches = updates_of(cfg)
    delays = {role: cfg.optimizer_of(role).delay for role in trained}
    steps = {role: (cfg.length - delay) * epochs * minibatches for role, delay in delays.items()}  # the role's own
    optimizers = {role: make_optimizer(cfg.optimizer_of(role), steps[role]) for role in trained}
    schedules = {role: make_schedule(cfg.optimizer_of(role), steps[role]) for role in trained}
    # log-probs are of the distribution sampled from, where responses are sampled
    shards = batch_shards(mesh)
    parts = choose_parts(cfg, shards, mesh.devices.flat[0].platform)
    sampler = sampler._replace(share_prompts=shares_prompts(cfg, shards, parts))
    bound = bind_nets(cfg, mesh, weights, sampler, sampler.sampling if algorithm.online else Sampling())
    packing, together = cfg.batch.pack_widths, kept_together(cfg)
    gaps = cfg.rewards.on_host and algorithm.online
    recipe = Recipe(algorithm, cfg.algorithm, bound, optimizers, delays, parts, packing, schedules, together, gaps)
    return Blueprint(cfg, algorithm, mesh, weights, heads_of(cfg), recipe, sampler)


def heads_of(cfg: Config) -> dict[Role, Head]:
    """The roles that the run needs under their heads, trained roles first."""
    trained, slow = roles_of(cfg)
    return {**trained, **slow}


def with_roles(run: Run, more: dict[Role, Head], sampler: generate.Sampler) -> Run:
    """``run`` with roles that its algorithm does without (an evaluation's), and responses sampled by ``sampler``."""
    weights = {role: find_weights(run.cfg, role, len(run.tokenizer), head) for role, head in more.items()}
    check_loaded(run.cfg, run.weights | weights, run.heads | more, roles_of(run.cfg)[0])
    tokenizers.forbid(run.tokenizer, foreign_tokens(run.cfg, weights, run.tokenizer))
    check_shapes(run.cfg, weights, run.mesh)
    weights = run.weights | weights
    if "policy" in weights:
        sampler = readable_by_all(sampler, run.tokenizer, weights)
    nets = bind_nets(run.cfg, run.mesh, weights, sampler, sampler.sampling)
    recipe = run.recipe._replace(nets=nets)
    return dataclasses.replace(run, weights=weights, heads=run.heads | more, recipe=recipe, sampler=sampler)


def runtime_of(cfg: Config, mesh: jax.sharding.Mesh) -> Runtime:
    """How the run's models are computed on the devices of ``mesh``."""
    compute, hardware = jnp.dtype(cfg.precision.compute), hardware_of(mesh.devices.flat[0])
    return Runtime(compute, cfg.remat, cfg.attention, hardware, cfg.scan_layers, cfg.generate.int8)


def bind_nets(
    cfg: Config,
    mesh: jax.sharding.Mesh,
    weights: dict[Role, Weights],
    sampler: generate.Sampler,
    sampling: Sampling,
) -> Nets:
    """What algorithms may ask of the run's models; log-probs are of the distribution that ``sampling`` shapes."""
    configs = {role: found.config for role, found in weights.items()}
    runtime = runtime_of(cfg, mesh)

    def sample(role: Role, trees: dict[Role, Params], prompts: Prompts, seed, step) -> Sequences:
        return generate.sample(trees[role], configs[role], prompts, seed, step, sampler, runtime)

    trunks = {role: nets.Trunk(trunk, cfg.models[role].trunk_gradient) for role, trunk in trunks_of(cfg).items()}
    return nets.make_nets(configs, runtime, sampling, sample, trunks)


def make_sampler(cfg: Config, tokenizer, weights: dict[Role, Weights]) -> generate.Sampler:
    """The sampler that ``generate`` asks for; its EOS tokens end all the run's rows, learnt or sampled."""
    ask = cfg.generate
    policy, eos_ids = weights.get("policy"), find_eos(cfg, tokenizer, weights)
    size = transformer.padded_vocab(policy.config) if policy else len(tokenizer)
    sampler = sampler_of(ask, tokenizer, eos_ids, size, cfg.batch.samples_per_prompt)
    sampler = sampler._replace(share_prompts=cfg.batch.share_prompts)
    return readable_by_all(sampler, tokenizer, weights) if policy else sampler


def readable_by_all(sampler: generate.Sampler, tokenizer, weights: dict[Role, Weights]) -> generate.Sampler:
    """``sampler``, which never samples a token that another model of the run could not read.

    Raises ConfigError where no response could end."""
    sizes = [found.config.vocab_size for found in weights.values()]
    own = weights["policy"].config.vocab_size
    unread = tokenizers.unreadable(tokenizer)
    banned = sorted({id for id in unread if id < own} | set(range(min(sizes), own)))
    if banned and set(sampler.eos_ids) <= {*banned, *range(own, max(sampler.eos_ids) + 1)}:
        id = sampler.eos_ids[0]
        why = unread.get(id, f"a model's vocab_size is {min(sizes)}")
        raise ConfigError(f"tokenizer: token {id}, which ends responses, is not known to every model: {why}")
    return sampler._replace(sampling=sampler.sampling._replace(banned=tuple(banned)))


def sampler_of(
    ask: generate.GenerateConfig, tokenizer, eos_ids: tuple[int, ...], vocab: int, samples_per_prompt: int = 1
) -> generate.Sampler:
    """The sampler for a model whose (padded) vocabulary has ``vocab`` rows, with its ending tokens and stop texts."""
    pieces = tokenizers.token_bytes(tokenizer) if ask.stop else []
    stops = [stop for text in ask.stop for stop in tokenizers.stop_forms(tokenizer, text)]
    return generate.make_sampler(ask, eos_ids, tokenizers.pad_id(tokenizer), pieces, vocab, samples_per_prompt, stops)


def find_eos(cfg: Config, tokenizer, weights: dict[Role, Weights]) -> tuple[int, ...]:
    """What ends a response: of a run with a checkpoint as it was decided; else what the tokenizer, its folder, its chat
    template say, and where the policy, or the reward model, starts."""
    if checkpoint.latest_step(cfg.run_dir) is not None:
        saved = checkpoint.read_extra(cfg.run_dir)[1].get("eos_ids")
        if saved:
            return tuple(saved)
    first = next((weights[role] for role in ("policy", "reward", *weights) if role in weights), None)
    return tokenizers.eos_ids(tokenizer, generation_config(first) if first else None)


def other_endings(run: "Run") -> list[str]:
    """What to say of reward models that were trained on rows that end otherwise than the run's responses do."""
    ours, lines = run.sampler.eos_ids, []
    words = lambda ids: ", ".join(map(repr, run.tokenizer.convert_ids_to_tokens(list(ids))))
    for role, found in run.weights.items():
        if role == "policy" or found.kind != "run" or found.path == run.cfg.run_dir or run.heads[role] == "lm":
            continue
        theirs = checkpoint.read_extra(found.path)[1].get("eos_ids") or ours
        if set(theirs) != set(ours):
            lines.append(
                f"warning: models.{base_role(run.cfg, role)}: {found.path}: was trained on rows that end with "
                f"{words(theirs)}, and responses here end with {words(ours)}; train it on this policy's tokenizer"
            )
    return lines


def spelled_markers(run: "Run") -> list[str]:
    """What to say of a chat template by name whose special tokens the tokenizer doesn't have."""
    missing = [word for word in chat.markers(run.cfg.data.chat) if word not in tokenizers.added_tokens(run.tokenizer)]
    if not missing:
        return []
    return [
        f"warning: data.chat.template: the tokenizer has no token {', '.join(missing)}: they are written in letters; "
        "zephyr and plain do without"
    ]


def generation_config(start: Weights) -> dict | None:
    """What a model's folder says of the ends of responses; of a run, the EOS tokens that it was trained with."""
    if start.kind == "run":
        return {"eos_token_id": checkpoint.read_extra(start.path, start.step)[1].get("eos_ids")}
    return {"eos_token_id": tokenizers.folder_eos(start.path)} if start.path else None


# ---- tokenizer ------------------------------------------------------------------------------------------------------


def find_tokenizer(cfg: Config):
    """The run's own tokenizer if it has a checkpoint; else the one the config names or asks to train, with the chat
    template of data.chat."""
    if checkpoint.latest_step(cfg.run_dir) is not None:
        return tokenizers.load_tokenizer(os.fspath(epath.Path(cfg.run_dir) / "tokenizer"))
    if cfg.tokenizer.train_vocab_size:
        tokenizer = train_tokenizer(cfg, cfg.tokenizer.train_vocab_size)
    else:
        tokenizer = tokenizers.load_tokenizer(os.fspath(located(tokenizer_of, *tokenizer_origin(cfg))))
    if cfg.data.chat is not None:
        chat.apply_config(tokenizer, cfg.data.chat, adds_bos=bool(tokenizers.leading_ids(tokenizer)))
    return tokenizer


def keep_tokenizer(cfg: Config, tokenizer) -> None:
    """Save it in the run, where it isn't the run's own already; what a start that came to nothing left is replaced."""
    own = epath.Path(cfg.run_dir) / "tokenizer"
    agree("tokenizer: its hash", tokenizers.fingerprint(tokenizer)[:12], "the same on all hosts")
    if checkpoint.latest_step(cfg.run_dir) is not None or not is_main():
        return
    if own.exists():
        own.rmtree()
    tokenizers.save_tokenizer(tokenizer, os.fspath(own))


def train_tokenizer(cfg: Config, vocab_size: int):
    """Byte-level BPE on all text of the demonstrations."""
    if cfg.data.demonstrations is None:
        raise ConfigError("tokenizer.train_vocab_size: needs data.demonstrations to train on")
    where, data = "data.demonstrations", cfg.data
    source = open_source(
        cfg.data.demonstrations,
        "demonstrations",
        cache_dir=data.cache_dir,
        skip_bad=data.skip_bad,
        path_in_config=where,
    )
    texts = map(tokenizers.text_of, source.usable(cfg.data.skip_bad))
    return tokenizers.train_bpe(texts, vocab_size, chat.markers(cfg.data.chat))


def tokenizer_origin(cfg: Config) -> tuple[str, str]:
    """(what names the tokenizer, the section that says so): tokenizer.init_from, else where the policy or the reward
    model starts."""
    named, where = cfg.tokenizer.init_from, "tokenizer"
    if named is None:
        roles = [role for role in ("policy", "reward", *cfg.models) if role in cfg.models]
        starts = [(base_role(cfg, role), origin(cfg, role).init_from) for role in roles]
        role, named = next((start for start in starts if start[1]), ("", None))
        where = f"models.{role}"
    if named is None:
        raise ConfigError("tokenizer: no model starts from files; expected tokenizer.init_from or .train_vocab_size")
    return named, where


def located(find: Callable[[Any], Any], named: Any, where: str, prefix: str = ""):
    """``find(named)``, whose error ("init_from: ..." after ``prefix``) is told as one of the config's section
    ``where``."""
    try:
        return find(named)
    except ValueError as error:
        raise ConfigError(f"{where}.{prefix}{error}") from None


def tokenizer_of(named: str):
    """The folder with the tokenizer of a run, a HF folder or a hub name."""
    run_dir, step = split_step(named)
    if not checkpoint.is_run(named):
        return hf_folder.locate(named)
    if step:
        find_step(named)
    return epath.Path(run_dir) / "tokenizer"


def find_step(named: str) -> int:
    """The step that the run ``named`` says (RUN, RUN@best, RUN@40). Raises ValueError, as hf_folder.locate says it."""
    try:
        return checkpoint.find_step(named)
    except ValueError as error:
        raise ValueError(f"init_from: {error}") from None


def foreign_tokens(cfg: Config, weights: dict[Role, Weights], tokenizer) -> dict[int, str]:
    """Tokens that some model cannot read -> why: as check_tokenizers finds, and as the run's own checkpoint says."""
    found = check_tokenizers(cfg, weights, tokenizer, tokenizer_of)
    if any(start.path == cfg.run_dir for start in weights.values()):
        kept = checkpoint.read_extra(cfg.run_dir)[1].get("unreadable", {})
        found |= {int(id): why for id, why in kept.items()}
    return found


def check_shapes(cfg: Config, weights: dict[Role, Weights], mesh: jax.sharding.Mesh) -> None:
    """The mesh divides every model, wherever it comes from, no row is longer than it computes, and the attention kernel
    that is asked for can compute it.

    Raises ConfigError for the first that is not so."""
    (longest, what), runtime = longest_row(cfg), runtime_of(cfg, mesh)
    for role, found in weights.items():
        where = f"models.{base_role(cfg, role)}" + (f": {found.path}" if found.path else "")
        padded = transformer.padded_vocab(found.config)
        values = {name: getattr(found.config, name) for name in SPLIT} | {"padded vocabulary": padded}
        for name, value in values.items():
            axes, devices = split_by(SPLIT.get(name, SPLIT["mlp_size"]), mesh.shape)
            if value % devices:
                nearest = min(divisors(value), key=lambda size: abs(size - devices))
                raise ConfigError(
                    f"{where}: its {name} {value} is not divided by {axes}: {devices}; nearest: {nearest}"
                )
        limit = row_limit(found.config)
        if limit is not None and longest > limit:
            raise ConfigError(f"{where}: computes rows of {limit} columns at most; expected that of {longest} = {what}")
        try:
            kernel = choose(runtime.attention, runtime.hardware, found.config, runtime.compute)
        except ValueError as error:
            raise ConfigError(f"{error} ({where})") from None
        widths = cfg.batch.pack_widths
        if widths > 1 and kernel != "xla":
            raise ConfigError(
                f"batch.pack_widths: {widths}: {kernel} attention ({where}) can't compute packed responses; "
                "expected 1, or attention: xla"
            )


def kernels_passed_over(cfg: Config, mesh: jax.sharding.Mesh, shapes: dict[Role, ModelConfig]) -> list[str]:
    """What to say of the models whose attention XLA computes although the devices have a kernel for it."""
    runtime = runtime_of(cfg, mesh)
    reasons: dict[str, list[Role]] = {}
    for role, shape in shapes.items():
        why = passed_over(runtime.hardware, shape, runtime.compute)
        if runtime.attention == "auto" and why:
            reasons.setdefault(why, []).append(role)
    return [f"attention: xla for {', '.join(roles)}: {why}" for why, roles in reasons.items()]


# ---- weights --------------------------------------------------------------------------------------------------------


def find_weights(cfg: Config, role: Role, vocab_size: int, wanted: Head = "lm") -> Weights:
    """What ``role`` starts from: the run's own checkpoint if there is one, else what the config names. Of two heads in
    a folder the one that is ``wanted`` is taken.

    Raises ConfigError where there is nothing, or a folder does not hold all of a model."""
    if checkpoint.latest_step(cfg.run_dir) is not None:
        step, extra = checkpoint.read_extra(cfg.run_dir)
        if role in extra["models"]:
            return Weights("run", cfg.run_dir, *checkpoint.model_of(extra["models"][role]), step, role)
    start = origin(cfg, role)
    if start.architecture is not None:
        shape = resolve(start.architecture, vocab_size)
        return Weights("new", None, shape, "lm")
    path = start.init_from or ""
    if checkpoint.is_run(path):
        step, extra = checkpoint.read_extra(path, located(find_step, path, f"models.{base_role(cfg, role)}"))
        named = next(name for name, model in cfg.models.items() if model is start)
        there = checkpoint.find_role(extra["models"], named)
        run_dir, _ = split_step(path)
        return Weights("run", run_dir, *checkpoint.model_of(extra["models"][there]), step, there)
    where = f"models.{base_role(cfg, role)}"
    folder = os.fspath(located(hf_folder.locate, path, where))
    return located(lambda folder: in_folder(folder, wanted), folder, where, "init_from: ")


def in_folder(folder: str, wanted: Head) -> Weights:
    """The Weights of a Hugging Face folder. Raises ValueError where its files are not those of a whole model."""
    shape, head = hf_config.read_config(folder)
    if wanted != "lm" and head == "lm" and hf_tensors.has_score(folder):
        head = "scalar"
    held = hf_tensors.examine(folder, shape, head)
    notes = (f"{folder}: not read: {hf_tensors.kinds(held.left)}",) if held.left else ()
    return Weights("hf", folder, shape, None if head == "scalar" and not held.has_score else head, notes=notes)


def initial_state(run: Run) -> TrainState:
    """Read or draw every role's weights. A role that starts from another is a copy of it: nothing is aliased."""
    trees: dict[Role, Params] = {role: read_weights(run, role) for role in run.heads}
    trained, slow = roles_of(run.cfg)
    controls = run.algorithm.controls(run.cfg.algorithm)
    params, still = {role: trees[role] for role in trained}, {role: trees[role] for role in slow}
    return state.new_state(run.cfg.seed, params, still, run.recipe.optimizers, controls)


def read_weights(run: Run, role: Role) -> Params:
    """One role's parameters on the mesh, under the head it needs. Random weights depend on the seed and on where the
    role starts, so that roles that start from the same random weights do."""
    found, head, zero = run.weights[role], run.heads[role], role == "value"
    number = sorted(run.cfg.models).index(base_role(run.cfg, role))
    key, dtype = jax.random.fold_in(jax.random.key(run.cfg.seed), number), run.dtype_of(role)
    if found.kind == "new":
        return jax.jit(lambda: transformer.init(found.config, head, key, dtype))()
    if head == "bare" and found.head in ("lm", None):  # there is nothing to read
        return state.scalar_head(found.config, key, dtype, zero)
    if found.kind == "run":
        models = checkpoint.read_extra(found.path, found.step)[1]["models"]
        params = checkpoint.restore_model(found.path, found.step, models, found.role, dtype, run.mesh)
    else:
        params = hf.load(found.path or "", found.config, found.head or "scalar", dtype)
        if found.head is None:
            del params["head"]  # drawn; that of change_head knows of ``zero``
    return whole(state.change_head(params, found.config, found.head or "lm", head, key, zero), run.mesh)


def abstract_state(drawn: Blueprint) -> TrainState:
    """The state's shapes and layouts, nothing allocated: what a checkpoint is restored into."""
    trained, slow = roles_of(drawn.cfg)

    def describe(role: Role) -> Params:
        return state.abstract_params(drawn.configs[role], drawn.heads[role], drawn.dtype_of(role), drawn.mesh)

    params, still = {role: describe(role) for role in trained}, {role: describe(role) for role in slow}
    controls = lambda: drawn.algorithm.controls(drawn.cfg.algorithm)
    return state.abstract_state(params, still, drawn.recipe.optimizers, controls, drawn.mesh)
