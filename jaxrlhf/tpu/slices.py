"""TPU slices: what an accelerator type is made of, by any of its names. Imports no JAX, so that launchers can.

A slice has three names: the cloud's accelerator type (v5litepod-256, where v4, v5p and tpu7x count TensorCores, two a
chip), the topology as libtpu is told it (v5e:16x16, counted in chips), and, on GKE, a pair of node labels.

Sources, read in November 2026:
- chips, HBM, layouts and VMs: https://docs.cloud.google.com/tpu/docs/ pages v4, v5e, v5p, v6e, tpu7x;
- runtime images: https://docs.cloud.google.com/tpu/docs/runtimes (the Cloud TPU API does not serve tpu7x at all);
- GKE labels and machine types: https://docs.cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus, and
  system_characteristics.py of github.com/AI-Hypercomputer/xpk;
- devices a chip: counted with jax.experimental.topologies and libtpu 0.0.52. A v4 chip is one device in the megacore
  mode in which it runs on machines, v5p likewise; a tpu7x chip is two.

``python -m jaxrlhf.tpu.slices`` prints the table.
"""

import math
import re
from typing import NamedTuple

from jaxrlhf.errors import nearest


class Generation(NamedTuple):
    """One generation of TPUs."""

    name: str  # as libtpu calls it
    accelerator: str  # how the cloud's accelerator types begin
    cores_per_chip: int  # that accelerator types count
    devices_per_chip: int  # that JAX shows
    hbm_gb: int  # a chip
    single_host: int  # chips of the largest slice that one VM holds; larger ones have 4 chips a VM
    runtime: str | None  # image of a TPU VM; None: the Cloud TPU API does not have it
    gke_accelerator: str  # label cloud.google.com/gke-tpu-accelerator
    layouts: tuple[str, ...]  # the usual one of each size, in chips


FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
GENERATIONS = {
    row.name: row
    for row in (
        Generation("v4", "v4", 2, 1, 32, 4, "tpu-ubuntu2204-base", "tpu-v4-podslice", CUBES),
        Generation("v5e", "v5litepod", 1, 1, 16, 8, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", FLAT),
        Generation("v5p", "v5p", 2, 1, 95, 4, "v2-alpha-tpuv5", "tpu-v5p-slice", (*CUBES, "16x16x16", "16x16x24")),
        Generation("v6e", "v6e", 1, 1, 32, 8, "v2-alpha-tpuv6e", "tpu-v6e-slice", FLAT),
        Generation("tpu7x", "tpu7x", 2, 2, 192, 4, None, "tpu7x", ("1x1x1", *CUBES)),
    )
}
ANY = 0.3  # names of slices are short: how alike one must be to be called the nearest
ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v5": "v5p", "v7x": "tpu7x"}


class Slice(NamedTuple):
    """One slice: chips whose links are fast."""

    generation: Generation
    layout: str  # "16x16", in chips

    @property
    def chips(self) -> int:
        return math.prod(map(int, self.layout.split("x")))

    @property
    def devices(self) -> int:
        """As many as jax.devices() shows."""
        return self.chips * self.generation.devices_per_chip

    @property
    def hosts(self) -> int:
        """VMs, each a process."""
        return self.chips // self.chips_per_host

    @property
    def chips_per_host(self) -> int:
        return self.chips if self.chips <= self.generation.single_host else 4

    @property
    def accelerator_type(self) -> str:
        """The cloud's name."""
        return f"{self.generation.accelerator}-{self.chips * self.generation.cores_per_chip}"

    @property
    def topology(self) -> str:
        """libtpu's name."""
        return f"{self.generation.name}:{self.layout}"


def find_slice(name: str) -> Slice:
    """The slice called ``name``: v5litepod-256, v5e-256, v5e:16x16, v5p-128, v5p:4x4x4, ...

    Raises ValueError, in one line with the nearest name, where there is none.
    """
    kind, colon, rest = name.partition(":" if ":" in name else "-")
    row = GENERATIONS.get(ALIASES.get(kind, kind))
    if row is None:
        known = nearest(kind, [*GENERATIONS, *ALIASES], "") != ""  # a mistyped TPU; else the nearest name says nothing
        near = nearest(name, accelerator_types(), cutoff=ANY) if known else f"generations: {', '.join(GENERATIONS)}"
        raise ValueError(f"{name}: no TPU slice, expected one such as v5litepod-8 or v5e:2x4; {near}")
    if colon == ":" or "x" in rest:
        return Slice(row, layout_of(row, name, rest))
    sizes = {slice_.accelerator_type: slice_ for slice_ in slices(row)}
    found = sizes.get(f"{row.accelerator}-{rest}")
    if found is None:
        unit = f", which counts {row.cores_per_chip} cores a chip" if row.cores_per_chip > 1 else ""
        close = min(sizes, key=lambda each: distance(each, rest))
        raise ValueError(f"{name}: no slice of this size{unit}; nearest: {close}; choices: {', '.join(sizes)}")
    return found


def layout_of(row: Generation, name: str, text: str) -> str:
    """``text`` where it can be a layout of this generation: one of the usual, or any 3D box that whole hosts fill."""
    dimensions = row.layouts[0].count("x") + 1
    if not re.fullmatch(r"[1-9][0-9]*(x[1-9][0-9]*)*", text) or text.count("x") + 1 != dimensions:
        raise ValueError(f"{name}: expected {dimensions} sizes in chips, as in {row.name}:{row.layouts[-1]}")
    chips, largest = Slice(row, text).chips, Slice(row, row.layouts[-1]).chips
    if text not in row.layouts and (dimensions == 2 or chips % 4 or chips > largest):
        choices = [f"{row.name}:{layout}" for layout in row.layouts]
        raise ValueError(f"{name}: no slice of this layout; {nearest(name, choices, cutoff=ANY)}")
    return text


def slices(row: Generation) -> list[Slice]:
    """The usual slices of one generation, small to large."""
    return [Slice(row, layout) for layout in row.layouts]


def accelerator_types() -> list[str]:
    return [slice_.accelerator_type for row in GENERATIONS.values() for slice_ in slices(row)]


def distance(accelerator_type: str, size: str) -> float:
    """How far, in powers of two, the size is from that of the accelerator type; of what is no number, all are far."""
    if not size.isdecimal() or not int(size):
        return math.inf
    return abs(math.log2(int(size) / int(accelerator_type.rpartition("-")[2])))


def table() -> str:
    """All usual slices as a markdown table."""
    rows = [
        "| accelerator | topology | chips | devices | hosts | HBM, GB | GKE labels |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in GENERATIONS.values():
        for each in slices(row):
            sizes = f"{each.chips} | {each.devices} | {each.hosts} | {each.chips * row.hbm_gb}"
            labels = f"`{row.gke_accelerator}`, `{each.layout}`"
            rows.append(f"| `{each.accelerator_type}` | `{each.topology}` | {sizes} | {labels} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
