"""The first thing that a new exit learns, in one go: how large its logits should be.

The final norm and matrix, copied onto an inner hidden state, give logits that are far too sure and mostly wrong (on
SmolLM2-135M, layer 20: a cross entropy of 18 nats where guessing gives 11). Gradient steps take long to shrink them.
One factor on the exit's norm, the best of a grid, does it at once; docs/log.md has the curves.
Shapes: B sequences, T rows, N rows, D hidden, V vocabulary.
"""

import torch
from torch import Tensor

from eellm.exits.lm import EarlyExitLM
from eellm.exits.loss import IGNORE, cross_entropy, upcast
from eellm.model.layers import Rows

SCALES = tuple(2 ** (-k / 2) for k in range(-2, 13))
"""From 2 down to 1/64."""
NUM_SEQUENCES = 4
"""Sequences that the factor is fitted on: the first of the text, whatever the layout of processes."""
MAX_ROWS = 512
"""Target rows among them that it is fitted on."""


@torch.no_grad()
def fit_scale(model: EarlyExitLM, layer: int, h_BTD: Tensor, rows: Rows, labels_BT: Tensor) -> None:
    """Multiplies the own norm of the exit at `layer`, if it has one, by the factor with the lowest cross entropy.

    h_BTD: the hidden state that the exit reads; rows: where its rows stand.
    """
    norm, labels_N = model.exit(layer).norm, labels_BT.flatten()
    chosen = (labels_N != IGNORE).nonzero().flatten()[:MAX_ROWS]
    if norm is None or not len(chosen):
        return
    z_ND = model.normed(layer, h_BTD, rows).flatten(0, -2)[chosen]
    logits_NV = upcast(model.logits(layer, z_ND))  # linear in the norm's weights
    losses = {scale: float(cross_entropy(logits_NV * scale, labels_N[chosen]).mean()) for scale in SCALES}
    norm.weight.mul_(min(losses, key=losses.__getitem__))
