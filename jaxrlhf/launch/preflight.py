"""What can be known before a long run: devices, mesh, run directory, network, memory, and what it starts from.

Every process of a run does it at once, as training would; process 0 tells of all.
"""

import contextlib
import os
import platform
import time
import uuid
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxrlhf.config.check import check
from jaxrlhf.config.record import Config
from jaxrlhf.errors import one_line
from jaxrlhf.hosts import processes
from jaxrlhf.launch.preflight_inputs import Inputs
from jaxrlhf.log.run_dir import is_local
from jaxrlhf.sharding import make_mesh

PACKAGES = ("jaxrlhf", "jax", "jaxlib", "libtpu", "flax", "orbax-checkpoint")
GB = 1e9

RARE = ("slice", "decode")  # mesh axes that are shown where they split something


class Finding(NamedTuple):
    """One thing that was looked at."""

    name: str
    ok: bool
    text: str

    def __str__(self) -> str:
        return f"{'ok' if self.ok else 'FAILED':<7} {self.name:<14} {self.text}"


def preflight(configs: Sequence[tuple[str, Config]]) -> bool:
    """Looks at everything that the configs, given as (path, config), need of this machine and of the others of the run,
    and prints it, a line each. Whether all is well on all of them."""
    lines, made = [attempt("versions", versions), attempt("devices", devices)], []
    for number, (path, cfg) in enumerate(configs):
        lines.append(attempt("mesh", lambda cfg=cfg, path=path: mesh(cfg, path)))
        lines.append(attempt("run_dir", lambda cfg=cfg: run_dir(cfg.run_dir, made)))
        earlier = {other.run_dir: name for name, other in configs[:number]}
        lines += [attempt(name, look) for name, look in Inputs(cfg, earlier).looks()]
    lines += [attempt("all-reduce", all_reduce), attempt("device memory", device_memory)]
    lines.append(attempt("host memory", host_memory))
    wrong = [line for line in lines if not line.ok]
    told = gather("; ".join(f"{line.name}: {line.text}" for line in wrong))
    for folder in made:  # not before every process has looked
        with contextlib.suppress(OSError, ValueError):  # another removed it, or training began in it
            folder.rmdir()
    if processes.is_main():
        print(*lines, sep="\n")
        others = [(process, text) for process, text in enumerate(told) if text and process]
        for process, text in others:
            print(Finding(f"process {process}", False, text))
    return not any(told)


def attempt(name: str, look: Callable[[], str]) -> Finding:
    """What ``look`` says; the error where it raises one, of whatever kind: storage and drivers have many."""
    try:
        return Finding(name, True, look())
    except Exception as error:
        return Finding(name, False, one_line(str(error) or type(error).__name__))


def gather(text: str) -> list[str]:
    """``text`` of every process."""
    return processes.everywhere(text)


# ---- what is looked at ----------------------------------------------------------------------------------------------


def versions() -> str:
    found = [f"python {platform.python_version()}"]
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):  # libtpu, where there is no TPU
            found.append(f"{package} {metadata.version(package)}")
    return ", ".join(found)


def devices() -> str:
    kind, count, processes = jax.devices()[0].device_kind, jax.device_count(), jax.process_count()
    return f"{count} x {kind}, {jax.local_device_count()} of them here; processes: {processes}"


def mesh(cfg: Config, path: str) -> str:
    """Makes the mesh. Raises ConfigError where it, or the batch, does not fit the devices."""
    check(cfg, jax.device_count(), path)
    made = make_mesh(cfg.mesh)
    return " x ".join(f"{axis} {size}" for axis, size in made.shape.items() if size > 1 or axis not in RARE)


def run_dir(path: str, made: list[epath.Path]) -> str:
    """Writes, reads and deletes a file there, as every process of a run does; ``made`` gets the directory, where it was
    not there. Raises what the storage raises."""
    folder, begin = epath.Path(path), time.perf_counter()
    if is_local(path) and not folder.exists():
        made.append(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file, text = folder / f".preflight-{uuid.uuid4().hex}", f"process {jax.process_index()}"
    file.write_text(text)
    try:
        if (found := file.read_text()) != text:
            raise OSError(f"{path}: wrote {text!r} and read {found!r}")
    finally:
        file.unlink()
    return f"{path}: wrote, read and deleted a file in {time.perf_counter() - begin:.2f} s"


def all_reduce() -> str:
    """Sums 1, 2, ... over all devices. Raises ArithmeticError for another sum than theirs."""
    begin, count = time.perf_counter(), jax.device_count()
    line = jax.make_mesh((count,), ("all",), axis_types=(AxisType.Auto,), devices=jax.devices())
    numbers, split = np.arange(1, count + 1, dtype=np.int32), NamedSharding(line, PartitionSpec("all"))
    rows = jax.make_array_from_callback((count,), split, lambda index: numbers[index])
    total = lambda x: jax.lax.psum(x.sum(), "all")
    mapped = jax.shard_map(total, mesh=line, in_specs=PartitionSpec("all"), out_specs=PartitionSpec())
    found, expected = int(processes.jit(mapped)(rows).addressable_data(0)), count * (count + 1) // 2
    if found != expected:
        raise ArithmeticError(f"{found} over {count} devices; expected {expected}")
    return f"{found} over {count} devices in {time.perf_counter() - begin:.2f} s, compilation included"


def device_memory() -> str:
    """Of the devices here, the one with least room."""
    stats = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    if not stats or "bytes_limit" not in stats[0]:
        return "not reported by these devices"
    free, limit = min((row["bytes_limit"] - row.get("bytes_in_use", 0), row["bytes_limit"]) for row in stats)
    return f"{free / GB:.1f} GB free of {limit / GB:.1f} on each device"


def host_memory() -> str:
    page = os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * page
    with contextlib.suppress(OSError), open("/proc/meminfo") as file:
        rows = dict(line.split(":") for line in file)
        return f"{int(rows['MemAvailable'].split()[0]) * 1024 / GB:.1f} GB free of {total / GB:.1f}"
    return f"{total / GB:.1f} GB"  # no /proc: macOS
