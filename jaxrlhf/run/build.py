"""From a Config to a run that is ready: its models and tokenizer found, its step composed."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf.algorithm import Algorithm
from jaxrlhf.config.batch import choose_micro_batches, kept_together, shares_prompts
from jaxrlhf.config.record import Config
from jaxrlhf.config.resolved import Resolved
from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.generate.sampler import Sampler
from jaxrlhf.models.config import ModelConfig
from jaxrlhf.ops.sampling import Sampling
from jaxrlhf.optim import make_optimizer, make_schedule
from jaxrlhf.rewards.graders import Graders, find_graders
from jaxrlhf.rewards.turns import TextEnvironment, find_environment
from jaxrlhf.run.epochs import with_iterations
from jaxrlhf.run.origins import Weights, check_loaded, check_teacher, located
from jaxrlhf.run.runtime import bind_nets, check_shapes, learned_matrices
from jaxrlhf.run.sampler import readable_by_all, run_sampler
from jaxrlhf.run.saved_run import SavedRuns
from jaxrlhf.run.tokenizer import find_tokenizer, foreign_tokens, keep_tokenizer
from jaxrlhf.run.weights import find_weights
from jaxrlhf.sharding import batch_shards, make_mesh
from jaxrlhf.step import Recipe
from jaxrlhf.types import Head, Role


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """A config made ready as far as shapes go: all that its programs are compiled from."""

    resolved: Resolved
    mesh: jax.sharding.Mesh
    weights: dict[Role, Weights]
    heads: dict[Role, Head]  # trained roles first
    recipe: Recipe
    sampler: Sampler

    @property
    def cfg(self) -> Config:
        return self.resolved.cfg

    @property
    def algorithm(self) -> Algorithm:
        return self.resolved.algorithm

    @property
    def configs(self) -> dict[Role, ModelConfig]:
        return {role: found.config for role, found in self.weights.items()}

    @property
    def dtypes(self) -> dict[Role, Any]:
        """``dtype_of`` every role."""
        return {role: self.dtype_of(role) for role in self.heads}

    def dtype_of(self, role: Role):
        """Number format of the role's own stored weights: precision.params, but float32 where the role learns: in
        bfloat16 an update of less than a 256th of a weight rounds to nothing, and so does Adam's second moment. An
        adapter is in float32, its base in precision.params."""
        exact = role in self.recipe.optimizers or role in self.resolved.bases
        return jnp.dtype("float32" if exact else self.cfg.precision.params)


@dataclasses.dataclass(frozen=True)
class Run(Blueprint):
    """A config made ready to train. Use it under ``sharding.current(run.mesh)``."""

    tokenizer: Any  # a transformers fast tokenizer
    graders: Graders | None  # functions that score on the host; None: the reward model scores, or nothing is sampled
    environment: TextEnvironment | None = None  # of text: answers the policy's responses
    recognised: dict[str, str] = dataclasses.field(default_factory=dict)  # section of data -> what its rows are
    saved_runs: SavedRuns = dataclasses.field(default_factory=SavedRuns)  # those that were read: its own, its origins


def build(
    resolved: Resolved, devices: list | None = None, keep: bool = True, saved_runs: SavedRuns | None = None
) -> Run:
    """Find weights and tokenizer, count the rows where the config gives epochs, and compose the step. Reads no weights;
    raises ConfigError for what does not fit. ``keep``: the tokenizer is saved in the run directory.
    ``saved_runs``: what has been read of saved runs already."""
    cfg, saved_runs = resolved.cfg, saved_runs or SavedRuns()
    graders = located(find_graders, cfg.rewards, "rewards")
    mesh = make_mesh(cfg.mesh, devices)
    tokenizer = find_tokenizer(saved_runs, cfg)
    make = lambda section: find_environment(section, cfg.rewards.timeout)
    environment = located(make, cfg.environment, "environment")
    heads = resolved.roles.heads
    weights = {role: find_weights(saved_runs, cfg, role, len(tokenizer), head) for role, head in heads.items()}
    check_loaded(cfg, weights, heads, resolved.roles.trained)
    check_teacher(cfg, weights, tokenizer)
    tokenizers.forbid(tokenizer, foreign_tokens(saved_runs, cfg, weights, tokenizer))
    sampler = run_sampler(saved_runs, cfg, tokenizer, weights)
    tokenizer.endings = sampler.eos_ids  # saved with it: what starts from this run ends responses as it does
    tools = environment and environment.tools
    drawn = draw(with_iterations(resolved, tokenizer, sampler.eos_ids, tools), mesh, weights, sampler)
    if keep:
        keep_tokenizer(saved_runs, drawn.cfg, tokenizer)
    found: dict[str, Any] = {"graders": graders, "environment": environment, "saved_runs": saved_runs}
    return Run(**vars(drawn), tokenizer=tokenizer, **found)


def draw(resolved: Resolved, mesh: jax.sharding.Mesh, weights: dict[Role, Weights], sampler: Sampler) -> Blueprint:
    """Compose the step for models of these shapes. Raises ConfigError where they do not fit the mesh or the rows."""
    check_shapes(resolved, weights, mesh)
    cfg, algorithm, trained = resolved.cfg, resolved.algorithm, resolved.roles.trained
    epochs, minibatches, _ = resolved.updates
    delays = {role: cfg.optimizer_of(role).delay for role in trained}
    steps = {role: (cfg.length - delay) * epochs * minibatches for role, delay in delays.items()}  # the role's own
    matrices = learned_matrices(resolved, weights)
    optimizers = {role: make_optimizer(cfg.optimizer_of(role), steps[role], matrices[role]) for role in trained}
    schedules = {role: make_schedule(cfg.optimizer_of(role), steps[role]) for role in trained}
    # log-probs are of the distribution sampled from, where responses are sampled
    shards = batch_shards(mesh)
    parts = choose_micro_batches(resolved, shards, mesh.devices.flat[0].platform)
    replays = algorithm.online and cfg.models["policy"].replay_routing
    sampler = sampler._replace(share_prompts=shares_prompts(resolved, shards, parts), keeps_routing=replays)
    read_as = sampler.sampling if algorithm.online else Sampling()
    bound = bind_nets(cfg, mesh, weights, sampler, read_as, resolved.roles.guides, resolved.bases)
    found = {role: cfg.optimizer_of(role).spike_sigmas for role in trained}
    spikes = {role: sigmas for role, sigmas in found.items() if sigmas is not None}
    coefs = {"load_balance": "router_aux_loss_coef", "router_z": "router_z_loss_coef"}
    weighed = lambda role: {name: weight for name, key in coefs.items() if (weight := getattr(cfg.models[role], key))}
    recipe = Recipe(
        algorithm,
        cfg.algorithm,
        bound,
        optimizers,
        delays,
        num_micro=parts,
        pack_widths=cfg.batch.pack_widths,
        schedules=schedules,
        spike_sigmas=spikes,
        together=kept_together(resolved),
        graders=tuple(cfg.rewards.functions),
        router_losses={role: found for role in trained if (found := weighed(role))},
    )
    return Blueprint(resolved, mesh, weights, resolved.roles.heads, recipe, sampler)


def with_roles(run: Run, more: dict[Role, Head], sampler: Sampler) -> Run:
    """``run`` with roles that its algorithm does without (an evaluation's), and responses sampled by ``sampler``."""
    weights = {
        role: find_weights(run.saved_runs, run.cfg, role, len(run.tokenizer), head) for role, head in more.items()
    }
    check_loaded(run.cfg, run.weights | weights, run.heads | more, run.resolved.roles.trained)
    tokenizers.forbid(run.tokenizer, foreign_tokens(run.saved_runs, run.cfg, weights, run.tokenizer))
    check_shapes(run.resolved, weights, run.mesh)
    weights = run.weights | weights
    if "policy" in weights:
        sampler = readable_by_all(sampler, run.tokenizer, weights)
    guides, bases = run.resolved.roles.guides, run.resolved.bases
    nets = bind_nets(run.cfg, run.mesh, weights, sampler, sampler.sampling, guides, bases)
    recipe = run.recipe._replace(nets=nets)
    return dataclasses.replace(run, weights=weights, heads=run.heads | more, recipe=recipe, sampler=sampler)
