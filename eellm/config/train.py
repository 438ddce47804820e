"""What a training recipe (TOML) says. One table per part; the same recipe runs under every layout of processes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from eellm.config.check import check_at_least, check_fraction, check_literals
from eellm.config.model import ModelConfig
from eellm.config.optim import OptimConfig
from eellm.config.parallel import ParallelConfig
from eellm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """`[data]`: the text. A source is a directory of `eellm prepare`, a .txt or .jsonl file, or `pydoc_data.topics`,
    the help texts that come with Python."""

    train: tuple[str, ...]
    """Sources to learn from."""
    weights: tuple[float, ...] = ()
    """Share of each source in the blend; unset, by its number of rows."""
    validation: tuple[str, ...] = ()
    """Sources to measure on; unset, the last `validation_fraction` of each training source, which isn't learnt."""
    validation_fraction: float = 0.01
    """Share of rows held back where `validation` is unset."""
    validation_rows: int = 64
    """Rows measured at each evaluation, the first ones of the validation text."""
    tokenizer: str = "bytes"
    """For sources that are text: a model directory with a tokenizer.json, or `bytes`."""
    seq_len: int = 512
    """Tokens in a row."""

    def __post_init__(self) -> None:
        check_at_least(self, 0, "validation_rows")
        check_at_least(self, 2, "seq_len")
        check_fraction(self, "validation_fraction")
        if not self.train:
            raise ConfigError("train = []: name at least one source")
        if self.weights and len(self.weights) != len(self.train):
            raise ConfigError(f"weights: {len(self.weights)} of them for {len(self.train)} sources; give one each")
        if self.weights and not (all(w >= 0 for w in self.weights) and sum(self.weights) > 0):
            raise ConfigError(f"weights = {self.weights!r}: must be at least 0, and not all of them 0")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """`[objective]`: the final exit's loss, plus each early exit's times its weight; every loss is a sum over target
    tokens divided by the global number of them."""

    exit_weights: tuple[float, ...] = ()
    """Weight of each exit's loss, in the order of layers; unset, 0.3 each. The final exit's is 1."""
    weight_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How weights go from `initial_weights` to `exit_weights` over the first `weight_warmup_steps` steps."""
    initial_weights: tuple[float, ...] = ()
    """Weights at step 0 (larger ones than `exit_weights` make a cool-down); unset, 0."""
    weight_warmup_steps: int = 0
    """Steps until the weights are reached."""
    curriculum: Literal["none", "rotational", "gradual"] = "none"
    """Which exits take part in a step: all, every `curriculum_period`-th in turn, or ever more from the top down."""
    curriculum_period: int = 2
    """rotational: the exit at layer l takes part in steps t with (l - 1 - t) mod period = 0."""
    temperature: float = 1.0
    """Exits' logits are divided by it before the loss; the final exit's aren't."""
    confidence_weighting: bool = False
    """Weight each token of an exit's loss by the exit's own confidence, held constant."""
    layer_dropout: float = 0.0
    """Probability that a sequence skips the last layer; layer l's is p · (exp((l - 1) ln 2 / (L - 1)) - 1)."""
    dropout_schedule: Literal["constant", "exponential"] = "constant"
    """How `layer_dropout` grows over the run: not at all, or by exp(t ln 2 / (T - 1)) - 1."""
    chunk_size: int = 1024
    """Rows (tokens) whose logits exist at a time."""

    def __post_init__(self) -> None:
        check_literals(self)
        check_at_least(self, 0, "weight_warmup_steps")
        check_at_least(self, 1, "curriculum_period", "chunk_size")
        check_fraction(self, "layer_dropout")
        if not self.temperature > 0:
            raise ConfigError(f"temperature = {self.temperature!r}: must be above 0")


@dataclass(frozen=True, kw_only=True)
class TrainLoopConfig:
    """`[train]`: how long, in what precision, where to."""

    out_dir: Path
    """The run's directory: metrics.jsonl, checkpoints/, tokenizer."""
    steps: int = 1000
    """Optimizer steps."""
    global_batch_size: int = 8
    """Rows in an optimizer step, over all data-parallel ranks and microbatches."""
    seed: int = 0
    """Of the random weights, the order of the data, and layer dropout."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Of the computation. Under bfloat16 and float16 parameters stay float32; float16 has a dynamic loss scale."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute; each process of a node takes the GPU of its local rank."""
    deterministic: bool = False
    """Use torch's deterministic algorithms."""
    peak_tflops: float | None = None
    """What one device can do at most in this precision, in TFLOP/s: then the model FLOP utilisation is logged."""
    log_every: int = 1
    """Steps between rows of metrics.jsonl."""
    evaluate_every: int = 0
    """Steps between evaluations; 0: only at the end."""
    resume: bool = True
    """Go on from the newest checkpoint in `out_dir`, if there is one."""
    max_bad_steps: int = 5
    """Steps in a row with a loss or gradient that isn't finite, each of them skipped, after which the run stops."""
    timeline: Path | None = None
    """Where to draw the measured timeline of one step, by rank, with exits apart: .svg, .json (a trace, which
    Perfetto opens) or .txt."""
    timeline_step: int = 3
    """Which step that is, counted from 1 at each start of the run; the last one of a shorter run. The first ones are
    slower than others."""
    tensorboard: bool = False
    """Write TensorBoard files to `out_dir`/tensorboard."""
    wandb: str | None = None
    """Project to log to at Weights & Biases."""

    def __post_init__(self) -> None:
        check_literals(self)
        check_at_least(self, 1, "steps", "global_batch_size", "log_every", "max_bad_steps", "timeline_step")
        check_at_least(self, 0, "evaluate_every", "seed", "peak_tflops")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """`[checkpoint]`: when states are kept."""

    every: int = 100
    """Steps between checkpoints; 0: only at the end."""
    keep: int = 2
    """Checkpoints kept; older ones go."""

    def __post_init__(self) -> None:
        check_at_least(self, 0, "every")
        check_at_least(self, 1, "keep")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Trains a model with early exits, from random weights or from a model directory."""

    model: ModelConfig
    data: TextConfig
    train: TrainLoopConfig
    init_from: Path | None = None
    """A model directory to take weights from. Its exits are taken too; those that only the recipe has start as copies
    of the model's own parts."""
    objective: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
