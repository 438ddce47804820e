"""What exits cost in memory: the allocator's peak on each stage of a pipeline of four processes under 1F1B.

    python benchmarks/train_memory.py [--out bench-out/train_memory.json]

The model has 8 layers (1, 1, 1 and 5 on the stages), hidden size 64 and a vocabulary of 16384, so that one microbatch's
logits outweigh its activations in a layer six times and, without exits, the last stage peaks highest. Exits with a
matrix of their own stand behind layers 1, 2 and 3: at the end of the first three stages, where most is in flight.
Numbers are those of the profiler's memory events in a second step, the optimizer's state being there from the first:
they depend on nothing else that runs on the machine.

Counted apart, as exits' own: parameters, gradients and optimizer state of what an exit adds to a stage. `growth` is the
rest. It holds one chunk of logits, and while a chunk is worked on the head's gradient twice (the chunk's and the sum of
those before, on its way to where gradients are kept).
"""

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.distributed.launcher import LaunchConfig, elastic_launch

from eellm.config.model import ExitConfig, ModelConfig
from eellm.config.parallel import ParallelConfig
from eellm.config.train import LossConfig, TextConfig, TrainConfig, TrainLoopConfig
from eellm.parallel.mesh import join
from eellm.pipeline.watched import unwatched
from eellm.train.check import resolve
from eellm.train.trainer import Trainer

NUM_STAGES = 4
NUM_MICROBATCHES = 6
EXITS = (1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is the same in all variants."""

    vocab_size: int = 16384
    hidden_size: int = 64
    seq_len: int = 256
    rows: int = 8
    """Sequences in a microbatch."""
    chunk_size: int = LossConfig().chunk_size

    @property
    def microbatch_bytes(self) -> int:
        """Logits of a microbatch."""
        return self.rows * self.seq_len * self.vocab_size * 4

    @property
    def chunk_bytes(self) -> int:
        """Logits of a chunk."""
        return self.chunk_size * self.vocab_size * 4

    @property
    def head_bytes(self) -> int:
        """An output matrix, or its gradient."""
        return self.vocab_size * self.hidden_size * 4

    @property
    def hidden_bytes(self) -> int:
        """The hidden state of a microbatch."""
        return self.rows * self.seq_len * self.hidden_size * 4


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Bytes on one stage."""

    step: int
    """The allocator's peak in a step: activations, gradients, what a loss takes while it is computed."""
    gradients: int
    held: int
    """Between steps: parameters and the optimizer's state."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench-out/train_memory.json"))
    options = parser.parse_args()
    sizes = Sizes()
    recipes = variants(sizes)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=NUM_STAGES,
        run_id="train_memory",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    by_rank = elastic_launch(config, measure)(list(recipes.values()))
    peaks = dict(zip(recipes, zip(*(by_rank[rank] for rank in range(NUM_STAGES)), strict=True), strict=True))
    Console(width=120).print(table(peaks, sizes))
    result = {
        "sizes": asdict(sizes),
        "torch": torch.__version__,
        "peaks": {name: [asdict(peak) for peak in stages] for name, stages in peaks.items()},
        "growth": {name: growth(stages, peaks["no exits"]) for name, stages in peaks.items()},
        "chunk_bytes": sizes.chunk_bytes,
        "microbatch_bytes": sizes.microbatch_bytes,
        "head_bytes": sizes.head_bytes,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")


def variants(sizes: Sizes) -> dict[str, TrainConfig]:
    """Recipes by name. The first has no exits."""
    model = ModelConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=3 * sizes.hidden_size,
        num_layers=8,
        num_heads=4,
        max_seq_len=sizes.seq_len,
    )
    parallel = ParallelConfig(
        pp=NUM_STAGES, schedule="1f1b", num_microbatches=NUM_MICROBATCHES, layers_per_stage=(1, 1, 1, 5)
    )
    plain = TrainConfig(
        model=model,
        data=TextConfig(train=("pydoc_data.topics",), seq_len=sizes.seq_len),
        train=TrainLoopConfig(out_dir=Path("runs/unused"), global_batch_size=sizes.rows * NUM_MICROBATCHES),
        objective=LossConfig(chunk_size=sizes.chunk_size),
        parallel=parallel,
    )
    exits = replace(plain, model=model.with_exits(tuple(ExitConfig(layer=n, head="own") for n in EXITS)))
    recipes = {
        "no exits": plain,
        "deferred, chunked": exits,
        "next stage, chunked": replace(exits, parallel=replace(parallel, exit_placement="next_stage")),
        "deferred, whole": replace(exits, objective=LossConfig(chunk_size=sizes.rows * sizes.seq_len)),
        "eager": replace(exits, parallel=replace(parallel, exit_mode="eager")),
    }
    return {name: resolve(recipe) for name, recipe in recipes.items()}


def measure(recipes: Iterable[TrainConfig]) -> list[Peak]:
    """This process's stage under each recipe; called on all processes at once."""
    torch.set_num_threads(1)
    return [_peak(recipe) for recipe in recipes]


def _peak(recipe: TrainConfig) -> Peak:
    trainer = Trainer(recipe, join(recipe.parallel), unwatched)
    trainer.step(1)
    trainer.optimizer.zero_grad(set_to_none=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        trainer.step(2)
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    state = [value for entry in trainer.optimizer.state.values() for value in entry.values()]
    return Peak(
        step=peak,
        gradients=sum(p.grad.nbytes for p in trainer.parameters if p.grad is not None),
        held=sum(tensor.nbytes for tensor in (*trainer.parameters, *state)),
    )


def growth(stages: Iterable[Peak], plain: Iterable[Peak]) -> list[int]:
    """By stage, bytes of the step's peak that exits add, without the gradients of their own parameters."""
    return [one.step - other.step - (one.gradients - other.gradients) for one, other in zip(stages, plain, strict=True)]


def table(peaks: dict[str, tuple[Peak, ...]], sizes: Sizes) -> Table:
    mb = 1e6
    found = Table(
        title=f"Peak MB by stage without what is the exits' own, and growth in chunks of logits; a chunk has "
        f"{sizes.chunk_bytes / mb:.1f} MB, a microbatch {sizes.microbatch_bytes / mb:.1f}, a head's gradient "
        f"{sizes.head_bytes / mb:.1f}"
    )
    plain = peaks["no exits"]
    found.add_column("variant")
    for stage in range(1, len(plain) + 1):
        found.add_column(f"stage {stage}", justify="right")
    for name, stages in peaks.items():
        more = growth(stages, plain)
        found.add_row(
            name,
            *(
                f"{(base.held + base.step + extra) / mb:.1f} (+{extra / sizes.chunk_bytes:.2f})"
                for base, extra in zip(plain, more, strict=True)
            ),
        )
    own = [
        one.held + one.gradients - base.held - base.gradients
        for one, base in zip(peaks["deferred, chunked"], plain, strict=True)
    ]
    found.add_row("exits' own, not moved", *(f"{num / mb:.1f}" for num in own))
    return found


if __name__ == "__main__":
    main()
