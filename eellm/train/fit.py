"""The first thing that a new exit learns, in one go: how large its logits should be.

The final norm and matrix, copied onto an inner hidden state, give logits that are far too sure and mostly wrong (on
SmolLM2-135M, layer 20: a cross entropy of 18 nats where guessing gives 11). Gradient steps take long to shrink them.
One factor on the exit's norm, the best of a grid, does it at once; docs/log.md has the curves.
Shapes: N rows, D hidden, V vocabulary.
"""

import torch

from eellm.data.loader import batches
from eellm.data.packing import Rows
from eellm.exits.lm import EarlyExitLM
from eellm.exits.loss import IGNORE, cross_entropy, upcast

SCALES = tuple(2 ** (-k / 2) for k in range(-2, 13))
"""From 2 down to 1/64."""
NUM_SEQUENCES = 4
"""Sequences that the factor is fitted on."""
MAX_ROWS = 512
"""Target rows among them that it is fitted on."""


@torch.no_grad()
def fit_scales(model: EarlyExitLM, layers: tuple[int, ...], text: Rows) -> dict[int, float]:
    """Multiplies each exit's own norm by the factor with the lowest cross entropy on the first rows of `text`.

    Returns the factors by layer; an exit without a norm of its own has none.
    """
    batch = next(batches(text, NUM_SEQUENCES)).to(model.decoder.embed.weight.device)
    rows = model.decoder.packed_rows(batch.positions_BT, batch.documents_BT)
    labels_N = batch.labels_BT.flatten()
    chosen = (labels_N != IGNORE).nonzero().flatten()[:MAX_ROWS]
    fitted = {}
    for layer, h_BTD in model.hiddens(batch.tokens_BT, rows, max(layers)):
        norm = model.exit(layer).norm if layer in layers else None
        if norm is None or not len(chosen):
            continue
        z_ND = model.normed(layer, h_BTD, rows).flatten(0, -2)[chosen]
        logits_NV = upcast(model.logits(layer, z_ND))  # linear in the norm's weights
        losses = {scale: float(cross_entropy(logits_NV * scale, labels_N[chosen]).mean()) for scale in SCALES}
        fitted[layer] = min(losses, key=losses.__getitem__)
        norm.weight.mul_(fitted[layer])
    return fitted
