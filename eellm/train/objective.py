"""What an exit learns while the backbone is frozen: the text, the final exit's distribution, and its gate.

Per target row:  (1 - β) · CE(label) + β · T² · KL(final exit at T ‖ exit at T)  +  BCE(gate, exit's choice = final's).
The gate reads the detached hidden state: it learns from the exit and never bends it.
Sources: EE-Tuning (arXiv 2402.00518), distillation (arXiv 1503.02531). Shapes: N rows, D hidden, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from eellm.config.tune import ObjectiveConfig
from eellm.exits.heads import Gate
from eellm.exits.loss import IGNORE, cross_entropy, upcast


class TuningObjective:
    """The objective of one exit on one batch (an `eellm.exits.loss.Objective`); `sums` keeps its parts for the log."""

    def __init__(
        self,
        config: ObjectiveConfig,
        labels_N: Tensor,
        *,
        teacher: Callable[[slice], Tensor] | None = None,
        gate: Gate | None = None,
    ) -> None:
        """teacher: the final exit's logits (N, V) of some rows; needed for beta > 0 and for the gate."""
        assert teacher is not None or (config.beta == 0 and gate is None)
        self.config = config
        self.labels_N = labels_N
        self.teacher = teacher
        self.gate = gate
        self.sums: dict[str, Tensor] = {}

    def __call__(self, z_ND: Tensor, logits_NV: Tensor, rows: slice) -> Tensor:
        labels_N = self.labels_N[rows]
        logits_NV = upcast(logits_NV)
        loss = self._count("loss", cross_entropy(logits_NV, labels_N).sum())
        if self.teacher is None:
            return loss
        is_target = labels_N != IGNORE
        with torch.no_grad():
            teacher_NV = upcast(self.teacher(rows))
            agrees_N = logits_NV.argmax(-1) == teacher_NV.argmax(-1)
            self._count("agreement", (agrees_N & is_target).sum())
        beta = self.config.beta
        if beta > 0:
            divergence = divergence_from(teacher_NV, logits_NV, self.config.temperature)
            loss = (1 - beta) * loss + beta * self._count("kl", divergence[is_target].sum())
        if self.gate is not None:
            guess_N = upcast(self.gate(z_ND.detach()))
            errors_N = F.binary_cross_entropy_with_logits(guess_N, agrees_N.to(guess_N), reduction="none")
            loss = loss + self._count("gate_loss", errors_N[is_target].sum())
        return loss

    def _count(self, name: str, value: Tensor) -> Tensor:
        self.sums[name] = self.sums.get(name, 0) + value.detach()
        return value


def divergence_from(teacher_NV: Tensor, student_NV: Tensor, temperature: float) -> Tensor:
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)) per row, (N,)."""
    log_p_NV = (teacher_NV / temperature).log_softmax(-1)
    log_q_NV = (student_NV / temperature).log_softmax(-1)
    return F.kl_div(log_q_NV, log_p_NV, reduction="none", log_target=True).sum(-1) * temperature**2
