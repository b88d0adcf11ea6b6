"""How the run's models are computed on its devices: mesh, kernels, networks."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import jax
import jax.numpy as jnp

from jaxrlhf.config.batch import divisors, longest_row
from jaxrlhf.config.check import SPLIT, split_by
from jaxrlhf.config.record import Config
from jaxrlhf.config.resolved import Resolved
from jaxrlhf.config.roles import graders_of, trunks_of
from jaxrlhf.errors import ConfigError, show
from jaxrlhf.generate import loop
from jaxrlhf.generate.actions import choose_action
from jaxrlhf.generate.sampler import Sampler
from jaxrlhf.models import int8, nets, parameters
from jaxrlhf.models.attention.kernels import choose_kernel, hardware_of, passed_over
from jaxrlhf.models.config import MLP, ModelConfig, row_limit
from jaxrlhf.models.context import refusal
from jaxrlhf.models.files import peft
from jaxrlhf.models.lora import Based, base_table, own_table, params_of, targets_of
from jaxrlhf.models.matrices import layer_matrices
from jaxrlhf.models.quantized import check_blocks
from jaxrlhf.models.transformer import Runtime
from jaxrlhf.ops.newton_schulz import Matrices
from jaxrlhf.ops.sampling import Sampling
from jaxrlhf.run.origins import Weights, base_role, located
from jaxrlhf.sharding import context_of
from jaxrlhf.types import Acting, Array, Nets, Prompts, Role, Sequences, Trees


def runtime_of(cfg: Config, mesh: jax.sharding.Mesh) -> Runtime:
    """How the run's models are computed on the devices of ``mesh``."""
    compute, hardware = jnp.dtype(cfg.precision.compute), hardware_of(mesh.devices.flat[0])
    generate = cfg.generate
    own = {"int8": generate.int8, "merge_adapter": generate.merge_adapter}
    return Runtime(compute, cfg.remat, cfg.attention, hardware, cfg.scan_layers, **own)


def bind_nets(
    cfg: Config,
    mesh: jax.sharding.Mesh,
    weights: dict[Role, Weights],
    sampler: Sampler,
    sampling: Sampling,
    guides: Sequence[Role] = (),
    bases: Mapping[Role, Based] = MappingProxyType({}),
) -> Nets:
    """What algorithms may ask of the run's models; log-probs are of the distribution that ``sampling`` shapes.
    ``guides``: the roles that guide what is sampled from the policy, where the sampler has a beta and they are among
    the trees; ``bases``: of the roles that share frozen weights."""
    configs = {role: found.config for role, found in weights.items()}
    runtime = runtime_of(cfg, mesh)

    def sample(role: Role, trees: Trees, prompts: Prompts, seed, step, /) -> Sequences:
        guided = role == "policy" and sampler.beta > 0
        heads = tuple(trees.params[guide] for guide in guides if guided and guide in trees.params)
        return loop.sample(params_of(role, trees, bases), configs[role], prompts, seed, step, sampler, runtime, heads)

    def extend(role: Role, trees: Trees, prompts: Prompts, seed, step, /) -> Sequences:
        one = sampler._replace(samples_per_prompt=1)
        return loop.sample(params_of(role, trees, bases), configs[role], prompts, seed, step, one, runtime)

    def act(role: Role, trees: Trees, acting: Acting, seed, step, /) -> tuple[Array, Array]:
        return choose_action(
            params_of(role, trees, bases), configs[role], acting, seed, step, sampler.sampling, runtime
        )

    replays = frozenset(role for role, model in cfg.models.items() if model.replay_routing)
    trunks = {role: nets.Trunk(trunk, cfg.models[role].trunk_gradient) for role, trunk in trunks_of(cfg).items()}
    found = nets.make_nets(configs, runtime, sampling, sample, trunks, graders_of(cfg), bases, replays)
    found = found._replace(apart=cfg.rewards.apart)
    if cfg.converses:
        return found._replace(extend=extend)
    return found._replace(act=act) if cfg.acts else found


def check_shapes(resolved: Resolved, weights: dict[Role, Weights], mesh: jax.sharding.Mesh) -> None:
    """The mesh divides every model, wherever it comes from, no row is longer than it computes, and the attention kernel
    that is asked for can compute it.

    Raises ConfigError for the first that is not so, and for an adapter that a model can't have."""
    check_adapters(resolved, weights)
    cfg, (longest, what), runtime = resolved.cfg, longest_row(resolved), runtime_of(resolved.cfg, mesh)
    for role, found in weights.items():
        where = f"models.{base_role(cfg, role)}" + (f": {found.path}" if found.path else "")
        padded = parameters.padded_vocab(found.config)
        values = {name: (getattr(found.config, name), keys) for name, keys in SPLIT.items()}
        tables = SPLIT["hidden_size"] if found.config.per_layer_size else ()  # whose vocabulary these split too
        values |= {"padded vocabulary": (padded, (*tables, *SPLIT["mlp_size"]))}
        for name, (value, keys) in values.items():
            axes, devices = split_by(tuple(dict.fromkeys(keys)), mesh.shape)
            if value % devices:
                nearest = min(divisors(value), key=lambda size: abs(size - devices))
                raise ConfigError(
                    f"{where}: its {name} {value} is not divided by {axes}: {devices}; nearest: {nearest}"
                )
        check_routing(cfg, role, found.config, where)
        if (devices := context_of(mesh)) > 1 and (problem := refusal(found.config)) is not None:
            raise ConfigError(f"mesh.context: {devices}: {where}: {problem}; nearest: 1")
        if (problem := int8.refusal(cfg.generate.int8, found.config)) is not None:
            raise ConfigError(f"generate.int8: weights: {where}: {problem}; expected [cache] or []")
        if found.config.family == MLP:
            continue  # no attention
        limit = row_limit(found.config)
        if limit is not None and longest > limit:
            raise ConfigError(f"{where}: computes rows of {limit} columns at most; expected that of {longest} = {what}")
        try:
            kernel = choose_kernel(runtime.attention, runtime.hardware, found.config, runtime.compute)
        except ValueError as error:
            raise ConfigError(f"{error} ({where})") from None
        widths = cfg.batch.pack_widths
        if widths > 1 and (devices := context_of(mesh)) > 1:
            raise ConfigError(
                f"batch.pack_widths: {widths}: mesh.context: {devices} splits the columns of each response; nearest: 1"
            )
        if widths > 1 and kernel != "xla":
            raise ConfigError(
                f"batch.pack_widths: {widths}: {kernel} attention ({where}) can't compute packed responses; "
                "expected 1, or attention: xla"
            )


ROUTING = ("router_aux_loss_coef", "router_z_loss_coef", "replay_routing")  # keys of models.<role>


def check_routing(cfg: Config, role: Role, shape: ModelConfig, where: str) -> None:
    """What is asked of a role's routers is asked of a model that has some. Raises ConfigError."""
    for key in ROUTING if role in cfg.models and not shape.num_experts else ():
        if value := getattr(cfg.models[role], key):
            wrong = f"models.{role}.{key}: {show(value)}: a {shape.family} has no experts ({where})"
            raise ConfigError(f"{wrong}; expected {show(type(value)())}")


def check_adapters(resolved: Resolved, weights: dict[Role, Weights]) -> None:
    """The models have the linear maps that their adapters are for, and are as wide as these. Raises ConfigError."""
    for role, (_, lora, kind) in resolved.bases.items():
        if kind is not None and role in weights:
            table = base_table(weights[role].config, {"lm"})
            located(lambda table, kind=kind: check_blocks(table, kind), table, f"models.{role}")
        if lora is not None and role in weights:
            located(lambda shape, lora=lora: targets_of(shape, lora), weights[role].config, f"models.{role}")
            if lora.init_from is not None and weights[role].kind != "new":  # else shapes alone are known: a plan
                located(lambda shape, lora=lora: peft.check_folder(shape, lora), weights[role].config, f"models.{role}")


def learned_matrices(resolved: Resolved, weights: dict[Role, Weights]) -> dict[Role, Matrices]:
    """The matrices of each role that learns, which Muon takes. Raises ConfigError where a row of ``optimizer`` names
    Muon and no role that it serves has one."""
    cfg, found = resolved.cfg, {}
    for role, head in resolved.roles.trained.items():
        shape, based = weights[role].config, resolved.bases.get(role)
        table = parameters.parameter_table(shape, head) if based is None else own_table(shape, head, based.lora)
        found[role] = layer_matrices(table)
    for name, row in cfg.optimizer.items():
        served = [role for role in found if cfg.optimizer_of(role) is row]
        if row.name == "muon" and served and not any(found[role] for role in served):
            raise ConfigError(
                f"optimizer.{name}.name: muon: {' and '.join(served)} learns no matrix inside a layer (an adapter, a "
                "head alone, or a model without layers); expected adamw"
            )
    return found


def kernels_passed_over(cfg: Config, mesh: jax.sharding.Mesh, shapes: dict[Role, ModelConfig]) -> list[str]:
    """What to say of the models whose attention XLA computes although the devices have a kernel for it."""
    runtime = runtime_of(cfg, mesh)
    reasons: dict[str, list[Role]] = {}
    for role, shape in shapes.items():
        why = "" if shape.family == MLP else passed_over(runtime.hardware, shape, runtime.compute)
        if runtime.attention == "auto" and why:
            reasons.setdefault(why, []).append(role)
    return [f"attention: xla for {', '.join(roles)}: {why}" for why, roles in reasons.items()]
