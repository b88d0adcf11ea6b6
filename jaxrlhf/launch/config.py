"""One launch as one record: which slice, which training config, where its run directory is. Read from YAML and checked,
the mesh against the slice included, before anything that costs money is made."""

import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal, NamedTuple

from jaxrlhf.config.overrides import apply_override, split_override
from jaxrlhf.config.ranges import range_problems
from jaxrlhf.config.strict import read_record
from jaxrlhf.config.yaml_text import read_file, read_yaml
from jaxrlhf.errors import ConfigError, dotted
from jaxrlhf.log.run_dir import made_by
from jaxrlhf.tpu.slices import Slice, find_slice

if TYPE_CHECKING:
    from jaxrlhf.config.record import Config

PROVIDERS = ("tpu_vm", "gke", "slurm", "skypilot")
MAX_NAME = 63  # characters of a DNS label
LONGEST_LOAN = 7 * 86400  # seconds that flex-start machines stay
SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class RetryConfig:
    """What is tried again, and how soon. Waits double from ``wait`` to ``longest_wait`` seconds."""

    poll: float = 30.0  # seconds between two looks at a resource
    wait: float = 60.0  # seconds before the first new try
    longest_wait: float = 1800.0
    stockouts: int = 50  # in a row, before giving up: no such machines are free
    restarts: int = 100  # of training after a preemption
    failures: int = 3  # within longest_wait of each other, of whatever kind but a mistake in the config


@dataclasses.dataclass(frozen=True)
class TpuVmConfig:
    """TPU VMs through queued resources."""

    runtime: str | None = None  # image of the VM; null: the one for this generation
    valid_until: str | None = None  # how long a request may wait in the queue, as in 6h; null: without end
    max_run_duration: str | None = None  # capacity flex-start: how long the machines stay, as in 24h; at most 7d
    network: str | None = None
    subnetwork: str | None = None
    service_account: str | None = None  # which can write to run_dir; null: that of Compute Engine
    internal_ips: bool = False  # without public addresses; ssh then goes through IAP


@dataclasses.dataclass(frozen=True, kw_only=True)
class GkeConfig:
    """A JobSet on Kubernetes."""

    image: str  # launch/Dockerfile, built and pushed
    namespace: str = "default"
    context: str | None = None  # of kubectl; null: the current one
    service_account: str | None = None  # of Kubernetes, bound to one of the cloud that can write to run_dir
    secret: str | None = None  # the Kubernetes Secret that holds the variables named in secrets
    queue: str | None = None  # of Kueue
    reservation: str | None = None  # its name, where capacity is reserved
    grace_seconds: int = 180  # between SIGTERM and SIGKILL: a checkpoint must fit
    run_as_user: int = 1000  # the image's user


@dataclasses.dataclass(frozen=True)
class SlurmConfig:
    """A job of SLURM, submitted on its cluster, in a folder that all nodes share."""

    partition: str | None = None
    account: str | None = None
    time: str | None = None  # limit, as in 24:00:00
    python: str = ".venv/bin"  # the folder of the command jaxrlhf on the nodes
    lines: tuple[str, ...] = ()  # of shell, before training: module load cuda


@dataclasses.dataclass(frozen=True)
class SkyPilotConfig:
    """A managed job of SkyPilot."""

    cloud: str = "gcp"
    runtime: str | None = None  # image of a TPU VM; null: the one for this generation
    strategy: Literal["EAGER_NEXT_REGION", "FAILOVER"] = "EAGER_NEXT_REGION"  # where to look after a preemption


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """One training run on machines."""

    name: str  # of what is made there: a DNS label
    accelerator: str  # of a TPU slice: v5litepod-256, v5p-128, v5p:4x4x4; of a GPU node: h100:8
    slices: int = 1  # TPU slices, or nodes of GPUs
    train: tuple[str, ...]  # training configs, run in order; paths from the top of the repository
    overrides: tuple[str, ...] = ()  # of them, as on the command line: KEY=VALUE or NAME:KEY=VALUE
    run_dir: str | None = None  # replaces that of the config; of several configs: the folder of all runs; gs://
    capacity: Literal["spot", "on-demand", "reserved", "flex-start"] = "spot"
    project: str | None = None
    zone: str | None = None
    preflight: bool = True  # run jaxrlhf preflight on every host first
    env: dict[str, str] = dataclasses.field(default_factory=dict)  # environment of training
    secrets: tuple[str, ...] = ()  # variables whose values are taken from the environment here, and never shown
    retry: RetryConfig = RetryConfig()
    tpu_vm: TpuVmConfig | None = None
    gke: GkeConfig | None = None
    slurm: SlurmConfig | None = None
    skypilot: SkyPilotConfig | None = None


class Machines(NamedTuple):
    """What ``accelerator`` and ``slices`` come to."""

    slice: Slice | None  # None: GPUs
    kind: str  # h100; of a TPU: the name of its generation
    devices: int  # as many as jax.devices() shows in all
    devices_per_slice: int
    hosts: int  # processes in all


class Launch(NamedTuple):
    """A launch that was checked."""

    cfg: LaunchConfig
    machines: Machines
    root: Path  # of the repository
    run_dirs: tuple[str, ...]  # of the training configs
    arguments: list[str]  # of ``jaxrlhf train`` and ``jaxrlhf preflight``

    @property
    def environment(self) -> dict[str, str]:
        """Of training, without secrets."""
        return {"PREFLIGHT": str(int(self.cfg.preflight)), **self.cfg.env}


def load_launch(path: os.PathLike | str, provider: str, root: Path, overrides: Sequence[str] = ()) -> Launch:
    """The launch in the YAML file ``path``, checked against its training config and the section of ``provider``.

    Raises ConfigError, a line a mistake: unknown keys, another slice, a mesh or batch that the slice does not fit, a
    run directory that would be lost with the machines."""
    source = os.fspath(path)
    tree = read_yaml(read_file(source), source)
    for text in overrides:
        apply_override(tree, split_override(text))
    tree[provider] = {} if tree.get(provider) is None and provider != "gke" else tree.get(provider)
    if isinstance(tree.get("train"), str):
        tree["train"] = [tree["train"]]
    cfg, problems = read_record(LaunchConfig, tree, ())
    problems = problems or [*range_problems(cfg)]
    if problems:
        raise ConfigError("\n".join(f"{source}: {dotted(keys)}: {text}" for keys, text in problems))
    lines = [*own_problems(cfg, provider)]
    if lines:
        raise ConfigError("\n".join(f"{source}: {line}" for line in lines))
    return check_training(cfg, root, provider, source)


def machines_of(cfg: LaunchConfig) -> Machines:
    """Raises ValueError, in one line, for an accelerator that is none."""
    kind, _, count = cfg.accelerator.partition(":")
    if count.isdecimal():
        if int(count) < 1:
            raise ValueError(f"{cfg.accelerator}: expected at least one device a node, as in {kind}:8")
        return Machines(None, kind, int(count) * cfg.slices, int(count), cfg.slices)
    found = find_slice(cfg.accelerator)
    name = found.generation.name
    return Machines(found, name, found.devices * cfg.slices, found.devices, found.hosts * cfg.slices)


def own_problems(cfg: LaunchConfig, provider: str) -> Iterator[str]:
    """What is wrong with the launch itself."""
    try:
        machines = machines_of(cfg)
    except ValueError as error:
        yield f"accelerator: {error}"
        return
    yield from provider_problems(cfg, provider, machines)
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", cfg.name):
        yield f"name: {cfg.name}: expected a DNS label (a-z, 0-9, -; a letter first); nearest: {dns_label(cfg.name)}"
    longest = longest_name(cfg, provider, machines)
    if len(longest) > MAX_NAME:
        too_many = len(longest) - MAX_NAME
        yield f"name: {cfg.name}: {longest} would have {len(longest)} characters; expected {too_many} fewer"
    for key in cfg.env:
        if SECRET.search(key):
            yield f"env.{key}: a secret would stand here in the open; expected secrets: [{key}]"
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
            yield f"env.{key}: expected the name of a variable"
    for key in cfg.secrets:
        if provider in ("tpu_vm", "skypilot") and key not in os.environ:
            yield f"secrets: {key}: not in the environment here; expected export {key}=..."


def provider_problems(cfg: LaunchConfig, provider: str, machines: Machines) -> Iterator[str]:
    """What this way of launching needs, and cannot do."""
    if provider == "gke" and cfg.gke is None:
        yield "gke: missing; expected a section with image"
    if not cfg.train:
        yield "train: []: expected at least one training config"
    yield from flex_start_problems(cfg, provider)
    if machines.slice is None and provider in ("tpu_vm", "gke"):
        yield f"accelerator: {cfg.accelerator}: {provider} has TPUs only; nearest: v5litepod-8"
    if machines.slice is None:
        return
    if provider == "slurm":
        yield f"accelerator: {cfg.accelerator}: slurm has nodes of GPUs; expected NAME:COUNT, as in h100:8"
    if provider == "skypilot" and cfg.slices > 1:
        yield f"slices: {cfg.slices}: SkyPilot makes one TPU slice; nearest: 1"
    if provider in ("tpu_vm", "skypilot") and machines.slice.generation.runtime is None:
        yield f"accelerator: {cfg.accelerator}: the Cloud TPU API does not have it; expected launch/gke.py"
    if provider in ("tpu_vm", "skypilot") and machines.slice.layout not in machines.slice.generation.layouts:
        yield f"accelerator: {cfg.accelerator}: the Cloud TPU API knows slices by size alone; expected launch/gke.py"
    if provider == "tpu_vm":
        yield from (f"{key}: missing; expected text" for key in ("project", "zone") if not getattr(cfg, key))
    if provider == "gke" and cfg.gke and cfg.gke.secret is None and cfg.secrets:
        yield "gke.secret: missing; secrets are named; expected the Secret that holds them"
    if provider == "gke" and cfg.gke and (cfg.capacity == "reserved") != (cfg.gke.reservation is not None):
        yield f"gke.reservation: {cfg.gke.reservation}: capacity is {cfg.capacity}; expected both or neither"


def flex_start_problems(cfg: LaunchConfig, provider: str) -> Iterator[str]:
    """Where flex-start (machines that are lent for a stated time) is to be had, and what it needs."""
    duration = cfg.tpu_vm.max_run_duration if cfg.tpu_vm else None
    if cfg.capacity != "flex-start":
        if duration is not None:
            yield f"tpu_vm.max_run_duration: {duration}: capacity is {cfg.capacity}; expected capacity: flex-start"
    elif provider not in ("tpu_vm", "gke"):
        yield f"capacity: flex-start: {provider} does not have it; nearest: on-demand"
    elif provider == "tpu_vm":
        found = re.fullmatch(r"([1-9][0-9]*)([smhd])", duration or "")
        seconds = int(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]] if found else 0
        if not 0 < seconds <= LONGEST_LOAN:
            yield f"tpu_vm.max_run_duration: {duration or 'missing'}: expected a time up to 7d, as in 24h"


def longest_name(cfg: LaunchConfig, provider: str, machines: Machines) -> str:
    """Of all that is made there."""
    if provider == "tpu_vm" and cfg.slices > 1:
        return f"{cfg.name}-{cfg.slices - 1}"  # a node
    if provider == "gke":
        return f"{cfg.name}-slice-{cfg.slices - 1}-{machines.hosts // cfg.slices - 1}-xxxxx"  # a pod
    return cfg.name


def check_training(cfg: LaunchConfig, root: Path, provider: str, source: str) -> Launch:
    """The launch with the arguments and run directories of its training configs, which are loaded and checked for these
    machines."""
    from jaxrlhf.config.check import check  # they load JAX
    from jaxrlhf.config.load import load_all

    machines, paths = machines_of(cfg), [root / path for path in cfg.train]
    for path in paths:
        if not path.resolve().is_relative_to(root.resolve()):
            raise ConfigError(
                f"{source}: train: {path.relative_to(root)}: not in {root}, which is what the machines get"
            )
    several = machines.slice is not None and cfg.slices > 1
    several = several and not any(override.startswith("mesh.slices=") for override in cfg.overrides)
    common = [*([f"mesh.slices={cfg.slices}"] if several else []), *cfg.overrides]
    overrides = [*common, *moved_runs(cfg, load_all(paths, common), source)]
    trainings = load_all(paths, overrides)
    problems: list[str] = []
    for name, training in zip(cfg.train, trainings):
        check(training, machines.devices, f"{name} on {cfg.slices} x {cfg.accelerator}", "in these machines")
        problems += mesh_problems(cfg, machines, training)
        if provider != "slurm":  # whose nodes share their file system with us
            problems += lost_problems(training)
    if problems:
        raise ConfigError("\n".join(f"{source}: {problem}" for problem in problems))
    return Launch(cfg, machines, root, tuple(one.run_dir for one in trainings), [*cfg.train, *overrides])


def moved_runs(cfg: LaunchConfig, trainings: Sequence["Config"], source: str) -> list[str]:
    """The overrides that put the runs below the launch's run_dir, and what starts from one of them with it.

    Raises ConfigError where file names do not tell the configs apart."""
    if cfg.run_dir is None or len(trainings) == 1:
        return [f"run_dir={cfg.run_dir}"] if cfg.run_dir else []
    names = [PurePosixPath(path).stem for path in cfg.train]
    for at, name in enumerate(names):
        called = [{stem, one.algorithm_name} for stem, one in zip(names, trainings)]
        other = next((path for i, path in enumerate(cfg.train) if i != at and name in called[i]), None)
        if other is not None:
            raise ConfigError(
                f"{source}: train: {cfg.train[at]}: {other} is called {name} too; expected different file names"
            )
    moved = {one.run_dir: f"{cfg.run_dir.rstrip('/')}/{name}" for name, one in zip(names, trainings)}
    overrides = [f"{name}:run_dir={moved[one.run_dir]}" for name, one in zip(names, trainings)]
    for name, one in zip(names, trainings):
        starts = {f"models.{role}.init_from": model.init_from for role, model in one.models.items()}
        for key, start in (starts | {"tokenizer.init_from": one.tokenizer.init_from}).items():
            if run := made_by(start, moved):
                overrides.append(f"{name}:{key}={moved[run]}{(start or '').removeprefix(run)}")
    return overrides


def mesh_problems(cfg: LaunchConfig, machines: Machines, training: "Config") -> Iterator[str]:
    """The mesh has the slices of the launch: what talks in every layer stays inside one."""
    if machines.slice and training.mesh.slices != cfg.slices:
        yield f"mesh.slices: {training.mesh.slices}: these machines are {cfg.slices} slices; nearest: {cfg.slices}"


def lost_problems(training: "Config") -> Iterator[str]:
    """Paths of this machine, which others do not have: files that git ignores are not sent."""
    if "://" not in training.run_dir:
        nearest = f"gs://BUCKET/{training.run_dir.lstrip('./~')}"
        yield f"run_dir: {training.run_dir}: would be lost with the machines; expected a shared one; nearest: {nearest}"
    paths = {f"models.{role}.init_from": model.init_from for role, model in training.models.items()}
    paths |= {"tokenizer.init_from": training.tokenizer.init_from}
    for field in dataclasses.fields(training.data):
        paths[f"data.{field.name}.path"] = getattr(getattr(training.data, field.name), "path", None)
    for key, value in paths.items():
        if value and "://" not in value and is_here_only(value.removeprefix("gguf:")):
            yield f"{key}: {value}: is not sent to the machines; expected a name of a hub, or gs://"


def is_here_only(path: str) -> bool:
    return path.startswith(("/", "~", "../")) or PurePosixPath(path).parts[:1] == ("runs",)


def dns_label(text: str) -> str:
    """``text`` made into one."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-0123456789")[:MAX_NAME].rstrip("-") or "jaxrlhf"


if __name__ == "__main__":
    from jaxrlhf.config.field_types import records
    from jaxrlhf.config.reference import reference_of

    print("\n".join(reference_of([path], record) for path, record in records(LaunchConfig)))
