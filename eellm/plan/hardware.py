"""What a device can do: a TOML file → a strict dataclass. Some come with the package, in `profiles/`.

    a100-40, a100-80, h100, cpu, or the path of a file like theirs → `Hardware`

Peaks are those of data sheets. What a program reaches of them is `efficiency`, the one number that must be measured
(`eellm plan --calibrate` writes a file with all of them measured).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from eellm.config.check import check_at_least, check_fraction, check_literals
from eellm.config.load import from_toml
from eellm.errors import ConfigError, did_you_mean

Dtype = Literal["float32", "bfloat16", "float16", "float64"]
PROFILES = Path(__file__).with_name("profiles")


@dataclass(frozen=True, kw_only=True)
class PeakFlops:
    """FLOP/s of matrix products at most, by the dtype of the factors; unset where the device has no such products."""

    float64: float | None = None
    float32: float | None = None
    bfloat16: float | None = None
    float16: float | None = None

    def __post_init__(self) -> None:
        check_at_least(self, 1, "float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class Link:
    """What connects two devices, one way."""

    bytes_per_s: float
    """Of a large message."""
    latency_s: float
    """Of an empty one."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "bytes_per_s")
        check_at_least(self, 0, "latency_s")

    def seconds(self, num_bytes: float) -> float:
        """What a message takes."""
        return self.latency_s + num_bytes / self.bytes_per_s


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One device and how it is connected to others like it."""

    name: str
    """As in `--hardware`."""
    device: Literal["cuda", "cpu"]
    """What torch calls it; some of torch's functions keep more for the backward on a CPU."""
    peak_flops: PeakFlops
    """FLOP/s of matrix products."""
    efficiency: float
    """Share of `peak_flops` that a whole layer reaches: with its norms and activations, and not only its products."""
    backward_ratio: float = 2.0
    """A layer's backward takes so many times its forward: two products for one."""
    memory_bytes: int
    """Capacity."""
    reserved_bytes: int = 0
    """Of it, what is taken before the first tensor: the driver's context, buffers of libraries."""
    memory_bytes_per_s: float
    """Read and written together."""
    optimizer_bytes_per_s: float | None = None
    """The same while the optimizer steps; unset, `memory_bytes_per_s`."""
    devices_per_node: int
    """Devices that `node_link` connects."""
    node_link: Link
    """Between two devices of a node."""
    network_link: Link
    """Between devices of two nodes, for each device."""

    def __post_init__(self) -> None:
        check_literals(self)
        check_fraction(self, "efficiency")
        check_at_least(self, 1, "memory_bytes", "memory_bytes_per_s", "optimizer_bytes_per_s", "devices_per_node")
        check_at_least(self, 0, "backward_ratio", "reserved_bytes")
        if self.efficiency == 0:
            raise ConfigError("efficiency = 0: must be above 0")

    def flops_per_s(self, dtype: Dtype) -> float:
        """What a layer reaches in `dtype`. Raises ConfigError where the device has no products of it."""
        peak = getattr(self.peak_flops, dtype)
        if peak is None:
            known = [name for name in ("float64", "float32", "bfloat16", "float16") if getattr(self.peak_flops, name)]
            raise ConfigError(
                f"hardware {self.name} has no peak_flops.{dtype}; train in {' or '.join(known)}, or add it"
            )
        return peak * self.efficiency

    def link(self, num_devices: int) -> Link:
        """The slowest link within a group that so many devices in a row span."""
        return self.node_link if num_devices <= self.devices_per_node else self.network_link


def find_hardware(name_or_path: str) -> Hardware:
    """A profile of the package by its name, or a .toml file. Raises ConfigError, naming the nearest profile."""
    if name_or_path.endswith(".toml"):
        return from_toml(Hardware, Path(name_or_path))
    if name_or_path not in profile_names():
        raise ConfigError(
            f"hardware {name_or_path!r} is not known{did_you_mean(name_or_path, profile_names())}; take one of "
            f"{', '.join(profile_names())}, or the path of a .toml file"
        )
    return from_toml(Hardware, PROFILES / f"{name_or_path}.toml")


def profile_names() -> list[str]:
    """Those that come with the package."""
    return sorted(path.stem for path in PROFILES.glob("*.toml"))
