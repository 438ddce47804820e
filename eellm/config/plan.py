"""What a user asks of the planner, beside the recipe. Plain numbers, no torch."""

from dataclasses import dataclass
from pathlib import Path

from eellm.config.check import check_at_least
from eellm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """`--decode.*`: how fast the model will generate."""

    exits: str = ""
    """Share of the tokens that leave at each exit, the last layer's included: 6=0.3,12=0.3,24=0.4. Unset, decoding
    isn't looked at."""
    pp: int = 1
    """Pipeline stages."""
    tp: int = 1
    """Devices that share each matrix product."""
    batch_size: int = 1
    """Sequences at a time."""
    context: int = 1024
    """Tokens that a new one attends to, on average."""
    seed: int = 0
    """Of the exits that are drawn in the pipeline's simulation."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "pp", "tp", "batch_size", "context")
        check_at_least(self, 0, "seed")
        self.shares  # noqa: B018  a bad one is named before any work

    @property
    def shares(self) -> dict[int, float]:
        """`exits` by layer."""
        pairs = [word.partition("=") for word in self.exits.split(",") if word]
        try:
            return {int(layer): float(share) for layer, _, share in pairs}
        except ValueError:
            raise ConfigError(
                f"decode.exits = {self.exits!r}: give layers and shares, like 6=0.3,12=0.3,24=0.4"
            ) from None


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What a training run will cost, before it is started."""

    hardware: str = "a100-80"
    """a100-40, a100-80, h100, cpu, or a .toml file of --calibrate."""
    search: bool = False
    """Find the fastest layout for --devices, instead of taking the recipe's."""
    devices: int | None = None
    """Devices to lay the run out over; unset, as many as the recipe's layout has."""
    memory_limit_gb: float | None = None
    """GiB that a device may hold; unset, what the hardware has."""
    timeline: Path | None = None
    """Where to draw the step: .svg, .json (a trace, opens in Perfetto) or .txt."""
    json: bool = False
    """Print JSON instead of tables."""
    paper_table: bool = False
    """Predict Table 1 of EE-LLM (arXiv 2312.04916) instead, and print it beside the paper's."""
    calibrate: Path | None = None
    """Measure this machine and write its profile there, as .toml."""
    decode: DecodeConfig = DecodeConfig()

    def __post_init__(self) -> None:
        check_at_least(self, 1, "devices")
        check_at_least(self, 0, "memory_limit_gb")
        if self.devices is not None and not self.search:
            raise ConfigError(f"--devices {self.devices}: is what --search looks for; add --search, or leave it out")
