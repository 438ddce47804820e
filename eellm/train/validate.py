"""What the exits say of the validation rows, wherever they run, as one table on rank 0.

The rows go through the stages in the batches of a single process, each data-parallel rank taking every dp-th. The
backbone is frozen, so what the final exit says never changes: it is asked once. Where the stages end at the deepest
exit, the layers behind it are loaded for that one at a time, and dropped again.
"""

from dataclasses import replace

import torch
from torch import Tensor

from eellm.data.loader import Batch
from eellm.errors import DataError
from eellm.exits.lm import EarlyExitLM
from eellm.exits.loss import IGNORE
from eellm.exits.metrics import ExitRows, ExitTable, ask_exit, join_rows
from eellm.parallel.mesh import World
from eellm.pipeline.frozen import FrozenStage
from eellm.pipeline.stage import stage_part
from eellm.train.build import Source

POLICIES = ("max_prob",)


class Validation:
    """The validation rows on this process."""

    def __init__(self, batches: list[Batch], source: Source, stage: FrozenStage, world: World) -> None:
        """Raises DataError where no row has a target."""
        self.batches, self.source, self.stage, self.world = batches, source, stage, world
        self.labels_N = torch.cat([batch.labels_BT[batch.labels_BT != IGNORE] for batch in batches])
        if not len(self.labels_N):
            raise DataError("the validation text has no token to be predicted; give more of it")
        dp = world.size // stage.stage.num_stages
        rounds = -(-len(batches) // dp)
        # NOTE as many on each rank, or sharded layers would wait for each other; some are asked about twice then
        self.mine = [(number * dp + world.dp_index) % len(batches) for number in range(rounds)]
        self.final: dict[int, ExitRows] = {}
        """What the final exit says, by batch; on the last stage, from the first evaluation on."""

    @torch.no_grad()
    def table(self) -> ExitTable | None:
        """Of all tuned exits and the final one, on rank 0."""
        stage, config = self.stage, self.source.config
        found: dict[tuple[int, int], ExitRows] = {}  # by layer and batch
        ends: dict[int, Tensor] = {}
        for index in self.mine:
            batch = self.batches[index].to(self.world.device)
            passed = stage.forward(batch, index)
            with stage.watch(f"validation of stage {stage.stage.index}, batch {index}"):
                for layer, h_BTD in passed.exits.items():
                    found[layer, index] = ask_exit(stage.model, layer, h_BTD, passed.rows, batch, POLICIES)
            if stage.stage.is_last and not self.final:
                ends[index] = passed.h_BTD
        stage.finish()
        if ends:
            self.final = self._ask_final(ends)
        found |= {(config.num_layers, index): rows for index, rows in self.final.items()}
        with stage.watch("gathering what the exits say", waits=True):
            gathered = self.world.gather(found)
        if not self.world.is_main:
            return None
        whole = {key: rows for part in gathered for key, rows in part.items()}
        layers, numbers = (*config.exit_layers, config.num_layers), range(len(self.batches))
        return ExitTable(self.labels_N, {n: join_rows([whole[n, index] for index in numbers]) for n in layers})

    def _ask_final(self, ends: dict[int, Tensor]) -> dict[int, ExitRows]:
        """From the hidden states behind the last stage."""
        stage, last, device = self.stage.stage, self.source.config.num_layers, self.world.device
        batches = {index: self.batches[index].to(device) for index in ends}
        rows = {
            index: self.stage.model.decoder.packed_rows(batch.positions_BT, batch.documents_BT, self.source.dtype)
            for index, batch in batches.items()
        }
        for n in range(stage.last + 1, last + 1):
            with self.stage.watch(f"layer {n} for the final exit's part in the validation"):
                layer = self._load(first=n, last=n, is_last=False).decoder.layer(n)
                ends = {index: layer(h_BTD, rows[index]) for index, h_BTD in ends.items()}
        with self.stage.watch("validation of the final exit"):
            mine = self.stage.model
            is_here = hasattr(mine.decoder, "norm") and hasattr(mine.decoder, "output")
            head = mine if is_here else self._load(first=last + 1, last=last, is_last=True)
            return {i: ask_exit(head, last, h_BTD, rows[i], batches[i], POLICIES) for i, h_BTD in ends.items()}

    def _load(self, *, first: int, last: int, is_last: bool) -> EarlyExitLM:
        """Layers `first` to `last`; with is_last, also the final norm and matrix."""
        stage = replace(self.stage.stage, index=1, num_stages=2 if is_last else 3, first=first, last=last, exits=())
        return self.source.load(stage_part(self.source.config, stage).to(self.source.dtype), device=self.world.device)
