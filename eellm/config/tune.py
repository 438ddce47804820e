"""What a tuning recipe (TOML) says. One table per part; every key has its default but the paths."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from eellm.config.check import check_at_least, check_fraction, check_literals
from eellm.config.model import ExitConfig
from eellm.config.optim import OptimConfig
from eellm.config.parallel import ParallelConfig
from eellm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """`[model]`: what is tuned."""

    base: Path
    """The model directory. Its weights are not changed."""
    adapter: Path | None = None
    """An adapter directory to start from, instead of `exits`."""
    exits: tuple[ExitConfig, ...] = ()
    """The exits to add."""
    init: Literal["copy", "random"] = "copy"
    """Start new exits from copies of the model's own parts, or at random."""
    fit_scale: bool = True
    """Scale new exits' norms at the start, so that their logits are no surer than they are right."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Of the computation. bfloat16 means autocast: parameters stay float32."""
    device: str = "cpu"
    """Where to compute."""

    def __post_init__(self) -> None:
        check_literals(self)
        if (self.adapter is None) == (not self.exits):
            raise ConfigError("exits: give either these, to add them, or an adapter to start from")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """`[data]`: the text. Files are .txt (one document each) or .jsonl (`text`, or `messages` of a chat)."""

    train: tuple[Path, ...]
    """Files to learn from."""
    validation: tuple[Path, ...] = ()
    """Files to measure on; unset, the last `validation_rows` rows of the training text, which are then not learnt."""
    validation_rows: int = 16
    """Rows measured at each evaluation."""
    seq_len: int = 512
    """Tokens in a row."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "validation_rows")
        check_at_least(self, 2, "seq_len")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """`[objective]`: (1 - beta) · CE + beta · T² · KL(final exit ‖ exit), summed over exits, per target token."""

    beta: float = 0.5
    """Share of distillation from the final exit; 0 learns from the text alone, 1 from the final exit alone."""
    temperature: float = 1.0
    """T: both distributions are softened by it in the KL."""
    gate: bool = True
    """Train the exits' gates too, on whether the exit's choice is the final one's."""
    chunk_size: int = 512
    """Rows whose logits exist at a time."""

    def __post_init__(self) -> None:
        check_fraction(self, "beta")
        check_at_least(self, 1, "chunk_size")
        if not self.temperature > 0:
            raise ConfigError(f"temperature = {self.temperature!r}: must be above 0")


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """`[train]`: how long, how often, where to."""

    out_dir: Path
    """The run's directory: adapter/, metrics.jsonl, state for resuming."""
    steps: int = 300
    """Optimizer steps."""
    batch_size: int = 2
    """Rows in a forward pass."""
    accumulate: int = 1
    """Forward passes per step."""
    seed: int = 0
    """Of the random weights and the order of the data."""
    evaluate_every: int = 50
    """Steps between evaluations; 0: only at the end."""
    save_every: int = 50
    """Steps between saved states; 0: only at the end."""
    resume: bool = True
    """Go on from a saved state in `out_dir`, if there is one."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "steps", "batch_size", "accumulate")
        check_at_least(self, 0, "evaluate_every", "save_every")


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """Trains the exits of a model whose backbone is frozen (EE-Tuning, arXiv 2402.00518)."""

    model: BaseConfig
    data: DataConfig
    train: LoopConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig = OptimConfig()
    parallel: ParallelConfig = ParallelConfig()

    def __post_init__(self) -> None:
        _refuse_meaningless(self.parallel)
        rows, dp = self.rows_per_step, self.parallel.dp
        if rows % dp:
            raise ConfigError(
                f"train.batch_size · accumulate = {rows}: must be a multiple of dp_replicate · dp_shard = {dp}"
            )
        if rows // dp % (self.parallel.num_microbatches or 1):
            fits = [n for n in range(1, rows // dp + 1) if rows // dp % n == 0]
            raise ConfigError(
                f"parallel.num_microbatches = {self.parallel.num_microbatches}: the {rows // dp} rows of a "
                f"data-parallel rank don't divide into as many; use one of {fits}"
            )

    @property
    def rows_per_step(self) -> int:
        """Of all processes together."""
        return self.train.batch_size * self.train.accumulate


_LAYOUT = ("pp", "dp_replicate", "dp_shard", "num_microbatches", "layers_per_stage", "timeout_s")
"""What a tuning run makes of `[parallel]`."""


def _refuse_meaningless(parallel: ParallelConfig) -> None:
    if parallel.tp > 1:
        raise ConfigError(
            f"parallel.tp = {parallel.tp}: an exit is compared with the final one over the whole vocabulary, so a "
            "process of a tuning run has all of it; use pp, dp_shard or dp_replicate"
        )
    for field in fields(ParallelConfig):
        value = getattr(parallel, field.name)
        if field.name not in _LAYOUT and value != field.default:
            raise ConfigError(
                f"parallel.{field.name} = {value!r}: it means nothing where the layers run forward only; a tuning run "
                f"takes {', '.join(_LAYOUT)}"
            )
