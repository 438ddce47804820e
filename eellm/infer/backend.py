"""What an engine computes with: all layers in this process, or a first stage here and workers for those behind it.

model → Backend: network, memory, loop; a crew where there are workers → the engine drives the loop
"""

from pathlib import Path

from eellm.checkpoint.hf import load
from eellm.exits.lm import EarlyExitLM
from eellm.infer.costs import StepCosts
from eellm.infer.loop import Loop
from eellm.infer.measure import measured
from eellm.infer.memory import Memory
from eellm.infer.network import Network
from eellm.infer.packing import Packed
from eellm.infer.pipelined.crew import Crew
from eellm.infer.pipelined.loop import PipelinedMemory
from eellm.infer.pipelined.start import check_workers, join, make_pipeline
from eellm.infer.prepare import network_of
from eellm.infer.quantize import Quantize
from eellm.infer.scheduler import Scheduler


class Backend:
    def __init__(
        self,
        model: EarlyExitLM | str | Path,
        *,
        quantize: Quantize | None,
        compile: bool | None,
        cache_dir: str | Path | None,
        packed: Packed | None,
        workers: int,
        tp: int,
        max_batch: int,
        timeout_s: float,
    ) -> None:
        """As `Engine`'s. Under torchrun it returns on rank 0 alone."""
        check_workers(workers, tp, compile)
        cache_dir = None if cache_dir is None else Path(cache_dir)
        met = join(workers, tp) if workers > 1 else None
        self.model = load(model) if isinstance(model, str | Path) else model
        self.quantize, self.compile, self.cache_dir = quantize, compile, cache_dir
        self.crew: Crew | None = None
        if workers == 1:
            self.network = network_of(self.model, quantize, cache_dir, compile, packed)
            memory = self.network.new_memory()
            self.memory: Memory | PipelinedMemory = memory
            self.loop = Loop(self.network, memory, Scheduler(self.costs))
            return
        pipeline = make_pipeline(
            self.model,
            workers,
            tp,
            met,
            quantize=quantize,
            compile=compile,
            cache_dir=cache_dir,
            max_batch=max_batch,
            timeout_s=timeout_s,
            costs=self.costs,
        )
        self.network, self.crew = pipeline.network, pipeline.crew
        self.memory, self.loop = pipeline.memory, pipeline.loop

    @property
    def weight_bytes(self) -> int:
        """Of all processes."""
        return self.network.num_bytes + (0 if self.crew is None else self.crew.weight_bytes)

    def costs(self) -> StepCosts:
        """Measured when they are first needed."""
        network = self.whole_network()
        if network.costs is None:
            network.costs = measured(network, self.cache_dir)
        return network.costs

    def whole_network(self) -> Network:
        """All layers. Where several stages share them they come into this process's memory when they are first needed:
        to score, and to know what drafts cost."""
        if len(self.network.held) == self.model.config.num_layers:
            return self.network
        return network_of(self.model, self.quantize, self.cache_dir, self.compile)
