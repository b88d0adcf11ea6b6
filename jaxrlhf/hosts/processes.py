"""Several processes as one run: found and joined before JAX touches a device, and kept in step on the host.

A process that dies is noticed by JAX's coordination service: after heartbeat_timeout it names the process on the stderr
of the others and aborts them (SIGABRT, exit code 134), wherever they wait.
"""

import contextlib
import ctypes
import dataclasses
import glob
import importlib.util
import itertools
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from jaxrlhf.errors import one_line
from jaxrlhf.hosts import signals
from jaxrlhf.hosts.exit_codes import EXIT_BROKEN
from jaxrlhf.hosts.rendezvous import meet

GRACE = 30  # seconds that JAX is given beyond init_timeout: its own timeout aborts without a word of use
MESSAGE_BYTES = 2048
calls = itertools.count()  # of stop_agreed, in step on all processes over all runs of a command
jax_handler: list[int] = []  # the address of JAX's handler of SIGTERM, in C, once it is joined with Python's


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """How the processes of a run find each other. JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID in the
    environment stand in for the first three. None of them is saved with the run."""

    coordinator: str | None = None  # HOST:PORT where process 0 listens; null: as the cluster says
    num_processes: int | None = None  # beside coordinator
    process_id: int | None = None  # beside coordinator: 0, 1, ..., another one for each process
    auto: bool = True  # without coordinator, join what TPU pods, SLURM, MPI or Kubernetes started; false: one process
    init_timeout: int = 300  # seconds until all processes have to be there
    heartbeat_timeout: int = 30  # seconds of silence after which a process is dead and the others exit


class Cluster(NamedTuple):
    """What the environment says of the processes that were started together."""

    name: str
    why: str  # how it shows
    options: Mapping[str, Any] = {}  # of jax.distributed.initialize
    certain: bool = True  # False: a host that may be one of several or not, which only JAX can ask


# ---- starting -------------------------------------------------------------------------------------------------------


def start(cfg: DistributedConfig, environment: Mapping[str, str] = os.environ) -> None:
    """Join the run's other processes. Call it before anything that touches a device; a plain run is left alone.

    Raises, in one line, ValueError where an address or a number is missing, and ConnectionError where processes stay
    away for init_timeout."""
    import jax

    if jax.distributed.is_initialized():
        return
    given = explicit(cfg, environment)
    cluster = None if given or not cfg.auto else detect(environment)
    if given is None and cluster is None:
        return
    if given:
        address, count, process = given
        meet(address, count, process, cfg.init_timeout)
        # deactivate: under SLURM, JAX would take one device of this host, whatever the address says
        options = {"coordinator_address": address, "num_processes": count, "process_id": process}
        options["cluster_detection_method"] = "deactivate"
        waiting = f"distributed.coordinator: {address}: its {count} processes"
    else:
        assert cluster is not None
        options = dict(cluster.options)
        waiting = f"distributed: the processes of {cluster.name} ({cluster.why})"
    with impatience(f"{waiting} were not all there within {cfg.init_timeout} s (distributed.init_timeout)", cfg):
        try:
            jax.distributed.initialize(
                **options,
                initialization_timeout=cfg.init_timeout + GRACE,
                heartbeat_timeout_seconds=cfg.heartbeat_timeout,
                shutdown_timeout_seconds=cfg.heartbeat_timeout,
            )
        except Exception as error:  # metadata servers, Kubernetes and gRPC raise many kinds
            if cluster and not cluster.certain and isinstance(error, (ValueError, OSError)):
                return  # no metadata of a pod: a TPU host of its own
            found = one_line(error) or type(error).__name__
            raise ConnectionError(
                f"{waiting} can't be joined: {found}; distributed.auto=false runs one alone"
            ) from error
    if several():
        join_handlers()
        for stop in signals.OPEN:
            if signal.SIGTERM in stop.previous:
                together(stop)


def explicit(cfg: DistributedConfig, environment: Mapping[str, str]) -> tuple[str, int, int] | None:
    """(address, processes, process) as the config says, or else the environment; None where neither names an address.

    Raises ValueError where only a part is given, or numbers do not fit."""
    whole = lambda name: int(environment[name]) if environment.get(name, "").isdigit() else None
    address = cfg.coordinator or environment.get("JAX_COORDINATOR_ADDRESS")
    count = cfg.num_processes if cfg.num_processes is not None else whole("JAX_NUM_PROCESSES")
    process = cfg.process_id if cfg.process_id is not None else whole("JAX_PROCESS_ID")
    if address is None:
        for name, value in (("num_processes", cfg.num_processes), ("process_id", cfg.process_id)):
            if value is not None:
                raise ValueError(
                    f"distributed.{name}: {value}: there is no distributed.coordinator; expected HOST:PORT"
                )
        return None
    if count is None and process is None and cfg.coordinator is None:
        return None  # an address for JAX's own detection of a cluster
    if not re.fullmatch(r".+:\d{1,5}", address):
        raise ValueError(f"distributed.coordinator: {address}: expected HOST:PORT of process 0, as in 10.0.0.1:8476")
    if count is None or process is None:
        missing = "num_processes" if count is None else "process_id"
        raise ValueError(f"distributed.{missing}: null: expected a number beside distributed.coordinator: {address}")
    if process >= count:
        raise ValueError(f"distributed.process_id: {process}: expected less than num_processes: {count}")
    return address, count, process


def detect(environment: Mapping[str, str]) -> Cluster | None:
    """The cluster that started this process as one of several; None where it stands alone.

    Looks at the environment and at device files only, so that a laptop never waits for an answer. The names are those
    that jax.distributed.initialize() goes by. Raises ValueError where they name it incompletely."""
    number = lambda name: int(environment[name]) if environment.get(name, "").isdigit() else 0
    if tpu := detect_tpu(environment):
        return tpu
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in environment for name in slurm) and number("SLURM_NTASKS") > 1:
        alone = re.fullmatch(r"1(\(x\d+\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
        return Cluster("SLURM", f"SLURM_NTASKS={number('SLURM_NTASKS')}", all_devices(bool(alone)))
    if number("OMPI_COMM_WORLD_SIZE") > 1:
        options = all_devices(number("OMPI_COMM_WORLD_LOCAL_SIZE") == 1)
        if "OMPI_MCA_orte_hnp_uri" not in environment:  # Open MPI 5
            options |= {"cluster_detection_method": "mpi4py"}
            need("mpi4py", "mpi4py", f"Open MPI (OMPI_COMM_WORLD_SIZE={number('OMPI_COMM_WORLD_SIZE')})")
        return Cluster("Open MPI", f"OMPI_COMM_WORLD_SIZE={number('OMPI_COMM_WORLD_SIZE')}", options)
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        why = f"JOB_COMPLETION_INDEX={environment['JOB_COMPLETION_INDEX']}"
        need("kubernetes", "jax[k8s]", f"Kubernetes ({why})")
        return Cluster("a Kubernetes job", why)
    return None


def detect_tpu(environment: Mapping[str, str]) -> Cluster | None:
    """The TPU slices that this host is a part of. GKE names the hosts in the environment; of a TPU VM only Google's
    metadata server knows, which JAX asks."""
    chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    if not chips or importlib.util.find_spec("libtpu") is None:
        return None
    slices = environment.get("MEGASCALE_NUM_SLICES", "1")
    if slices != "1":
        return Cluster("a TPU pod", f"MEGASCALE_NUM_SLICES={slices}")
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        if hosts := environment.get(name):
            return Cluster("a TPU pod", f"{name}={hosts}") if "," in hosts else None
    if "TPU_SKIP_MDS_QUERY" in environment:
        return None
    return Cluster("a TPU pod", "by the metadata server", certain=False)


def all_devices(alone: bool) -> dict[str, Any]:
    """A process alone on its host takes all of the devices, which JAX else divides as one a process."""
    return {"local_device_ids": []} if alone else {}


def need(module: str, package: str, cluster: str) -> None:
    """Raises ValueError where JAX needs a package to find the processes of a cluster."""
    if importlib.util.find_spec(module) is None:
        raise ValueError(
            f"distributed: {cluster}: finding its processes needs pip install '{package}'; or give "
            "distributed.coordinator, num_processes and process_id; or distributed.auto=false for one process"
        )


class impatience:
    """Ends this process with ``message`` when the block takes longer than init_timeout: JAX's own timeout aborts it
    with a stack trace that names nothing."""

    def __init__(self, message: str, cfg: DistributedConfig):
        self.timer = threading.Timer(cfg.init_timeout + 1, self.give_up, [message])
        self.timer.daemon = True

    def give_up(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)
        os._exit(EXIT_BROKEN)

    def __enter__(self) -> None:
        self.timer.start()

    def __exit__(self, *_: object) -> None:
        self.timer.cancel()


# ---- in step --------------------------------------------------------------------------------------------------------


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    import jax

    return jax.process_index() == 0


def several() -> bool:
    """Whether other processes belong to this run. Never touches a device in a run of one process."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def on_main(work: Callable[[], Any]) -> Any:
    """What ``work`` returns on process 0, the only one that calls it; None on the others, which wait until it is done.

    Raises ValueError on every process, with the same line, where it raised one on process 0."""
    if not several():
        return work()
    result, problem, failed = None, "", None
    if is_main():
        try:
            result = work()
        except Exception as error:
            failed, problem = error, str(error) or type(error).__name__
    problem = everywhere(problem)[0]
    if failed:
        raise failed
    if problem:
        raise ValueError(problem)
    return result


def agree(what: str, value: str, expected: str) -> None:
    """Raises ValueError on every process where ``value`` isn't the same on all."""
    if not several():
        return
    found = everywhere(value)
    odd = next((process for process, other in enumerate(found) if other != found[0]), None)
    if odd is not None:
        raise ValueError(f"{what}: process 0 has {found[0]} and process {odd} has {found[odd]}; expected {expected}")


def everywhere(text: str) -> list[str]:
    """What each process called this with, in the order of the processes. Waits for all of them."""
    if not several():
        return [text]
    import numpy as np
    from jax.experimental import multihost_utils

    data = np.frombuffer(text.encode()[: MESSAGE_BYTES - 1].ljust(MESSAGE_BYTES, b"\0"), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(data))
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in rows]


def first_told(text: str) -> str:
    """What the first process that has something to tell called this with; "" where none has. Waits for all of them."""
    return next(filter(None, everywhere(text)), "")


def wait() -> None:
    """Returns when all processes are here."""
    everywhere("")


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """jax.jit, but in a run of several processes each program is compiled on all of them before one runs it: where a
    process starts late, the collectives of the others give up on it (Gloo after 30 s)."""
    import jax

    jitted, programs = jax.jit(function), {}

    def call(*arguments: Any) -> Any:
        leaves, structure = jax.tree.flatten(arguments)
        key = structure, tuple((x.shape, x.dtype) for x in leaves)
        if key not in programs:
            programs[key] = jitted.lower(*arguments).compile()
            wait()
        return programs[key](*arguments)

    return call if several() else jitted


def stop_agreed() -> bool:
    """Whether all processes stop here, because one of them got SIGTERM. Call it once a step, on all of them.

    The notice travels in the background; the processes agree on the first step that none has begun, so nothing waits.
    """
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(next(calls))


def join_handlers() -> None:
    """Gives SIGTERM back to Python, from whose handlers JAX took it, as it tells the other processes of it by a handler
    in C: this process has to hear of it as well, to end what never returns. ``stop_all`` calls JAX's."""
    python = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or not callable(python):
        return
    action = ctypes.create_string_buffer(256)  # struct sigaction, which begins with the handler
    ctypes.CDLL(None).sigaction(int(signal.SIGTERM), None, action)
    signal.signal(signal.SIGTERM, python)
    jax_handler[:] = [int.from_bytes(action.raw[: ctypes.sizeof(ctypes.c_void_p)], sys.byteorder)]


def stop_all() -> None:
    """Tells all processes of the run to stop at one step, by JAX's notice of a preemption."""
    if jax_handler:
        ctypes.CFUNCTYPE(None, ctypes.c_int)(jax_handler[0])(int(signal.SIGTERM))
    else:
        os.kill(os.getpid(), signal.SIGTERM)  # nothing but JAX hears it


def together(stop: signals.Stop) -> None:
    """In a run of several processes all stop after the same iteration, also where there is nothing to save."""
    stop.saves = several()
    stop.relay = stop_all if several() else None


# ---- leaving --------------------------------------------------------------------------------------------------------


def abandon(code: int) -> None:
    """Leave a run of several processes that broke down here. JAX's own farewell at exit would wait for processes that
    wait for this one; without it, they are told within heartbeat_timeout. Returns in a run of one process."""
    if not several():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if is_main():
        time.sleep(3)  # the others may be about to say the same: without process 0 they are aborted
    os._exit(code)


@contextlib.contextmanager
def naming_the_dead(heartbeat_timeout: int) -> Iterator[None]:
    """Where work between processes fails in this block, most likely because one died: says so, and waits until the
    coordination service aborts this process with the number of that one (within ``heartbeat_timeout``)."""
    import jax

    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        of_jax = isinstance(error, jax.errors.JaxRuntimeError) or re.match(r"[A-Z_]+: Gloo ", str(error))
        if several() and of_jax:  # an allgather gives ValueError: UNKNOWN: Gloo AllGather failed: ...
            what = (str(error).strip() or type(error).__name__).splitlines()[0]
            print(
                f"process {jax.process_index()} of {jax.process_count()}: work shared with the other processes failed; "
                f"if one of them died, its number follows within {heartbeat_timeout} s: {what}",
                file=sys.stderr,
                flush=True,
            )
            time.sleep(heartbeat_timeout + 5)
        raise
