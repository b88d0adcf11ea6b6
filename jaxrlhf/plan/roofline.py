"""What one device does in each phase of an iteration, and how long a chip takes for it at least."""

from typing import Literal, NamedTuple

from jaxrlhf.tpu.peaks import Chip


class DeviceWork(NamedTuple):
    """What one device does."""

    flops: float = 0.0
    hbm: float = 0.0  # bytes
    ici: float = 0.0  # bytes received within the slice
    dcn: float = 0.0  # bytes received from other slices

    def plus(self, other: "DeviceWork") -> "DeviceWork":
        return DeviceWork(*(ours + theirs for ours, theirs in zip(self, other)))

    def times(self, count: float) -> "DeviceWork":
        return DeviceWork(*(part * count for part in self))


class Phase(NamedTuple):
    """A part of the iteration. ``useful``: FLOPs of a device that are no recomputation."""

    name: str
    work: DeviceWork
    useful: float


class TimedPhase(NamedTuple):
    """A phase on a chip: seconds at least, and what takes them."""

    phase: Phase
    seconds: float
    bound: Literal["compute", "HBM", "network", "between slices"]


def timed(phase: Phase, chip: Chip, devices_per_chip: int = 1) -> TimedPhase:
    """The roofline: a phase lasts as long as the slowest of compute, memory and networks."""
    peaks = {"compute": chip.flops, "HBM": chip.bandwidth, "network": chip.ici, "between slices": chip.dcn}
    seconds = {name: part * devices_per_chip / peaks[name] if part else 0.0 for name, part in zip(peaks, phase.work)}
    slowest = max(seconds, key=lambda name: seconds[name])
    return TimedPhase(phase, seconds[slowest], slowest)  # type: ignore[arg-type]
