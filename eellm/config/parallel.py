"""`[parallel]`: how a run is laid out over processes. One process is the layout of all ones."""

from dataclasses import dataclass
from typing import Literal

from eellm.config.check import check_at_least, check_literals
from eellm.errors import ConfigError

Schedule = Literal[
    "gpipe", "1f1b", "filled_1f1b", "interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble", "zbv", "dualpipev"
]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """`[parallel]`: the mesh is pp × dp_replicate × dp_shard × tp, and its size the number of processes."""

    dp_replicate: int = 1
    """Copies of the model, each on rows of its own; gradients are summed over them."""
    dp_shard: int = 1
    """Processes among which parameters, gradients and optimizer state of one copy are sharded (FSDP2)."""
    tp: int = 1
    """Processes that share each matrix product and, between them, the sequence (tensor and sequence parallel)."""
    pp: int = 1
    """Processes in a row, each with a stage (or several) of the layers."""
    schedule: Schedule = "1f1b"
    """Who computes what when under pp > 1; the names are torch's. filled_1f1b: 1f1b, with microbatches beyond those of
    the global batch in its idle time, which take no longer and make gradients less noisy (see Planning)."""
    num_microbatches: int | None = None
    """Parts of a data-parallel rank's rows: what a pipeline works on, or gradient accumulation without one. Unset: 1
    without a pipeline; with one, the fewest from 4 · pp on that the schedule and the rows allow, or the most."""
    stages_per_rank: int = 2
    """Stages on each rank under interleaved_1f1b, looped_bfs and interleaved_zero_bubble; zbv and dualpipev have 2,
    gpipe, 1f1b and filled_1f1b have 1."""
    layers_per_stage: tuple[int, ...] | None = None
    """Number of layers of each stage, in order; unset, as even as possible with the heads counted in."""
    exit_placement: Literal["stay", "next_stage", "auto"] = "stay"
    """Where an exit behind a stage's last layer runs: there, or at the start of the next stage, which has fewer
    microbatches in flight (EE-LLM's second optimisation). auto: there where the next stage has less to do."""
    exit_mode: Literal["deferred", "eager", "checkpoint"] = "deferred"
    """When an exit's logits are made: in the backward, a chunk at a time; in the forward, and kept; in the forward,
    and again in the backward. The last two are for comparison."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Which activations of a layer are computed again in the backward: none, all but what its matrix products put out,
    all."""
    compile: bool = False
    """Compile each layer with torch.compile."""
    timeout_s: float = 600.0
    """Seconds without progress after which a run names the rank that hangs, and ends."""

    def __post_init__(self) -> None:
        check_literals(self)
        check_at_least(self, 1, "dp_replicate", "dp_shard", "tp", "pp", "num_microbatches", "stages_per_rank")
        check_at_least(self, 0, "timeout_s")
        if self.layers_per_stage is not None and any(n < 0 for n in self.layers_per_stage):
            raise ConfigError(f"layers_per_stage = {self.layers_per_stage!r}: must not be negative")

    @property
    def dp(self) -> int:
        """Number of data-parallel ranks."""
        return self.dp_replicate * self.dp_shard

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.pp * self.dp * self.tp
