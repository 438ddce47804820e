"""Which sequences skip which layers in a step of training: LayerSkip's layer dropout (arXiv 2404.16710).

Deeper layers are skipped more often, and more so as the run goes on, so that the exits before them learn to do
without. Drawn for the global batch from (seed, step) alone: every layout of processes takes its rows of the same mask,
and so does a resumed run. Without torch.
"""

import numpy as np

from eellm.config.train import LossConfig

STREAM = 0xD0
"""Keeps these random numbers apart from others that are drawn with the same seed."""


def layer_dropout_rates(config: LossConfig, num_layers: int, step: int, num_steps: int) -> np.ndarray:
    """Probability, at `step` (from 1) of `num_steps`, that a sequence skips layer l: (num_layers,), layer 1 first.

    p_l = S(t) · p · (exp((l - 1) ln 2 / (L - 1)) - 1), so 0 at the first layer and S(t) · p at the last. S is 1, or
    goes from 0 at the first step to 1 at the last by exp(t ln 2 / (T - 1)) - 1, where t counts from 0 as in the paper.
    """
    depth = np.arange(num_layers) / max(num_layers - 1, 1)
    progress = (step - 1) / max(num_steps - 1, 1)
    scale = 1.0 if config.dropout_schedule == "constant" else 2.0**progress - 1
    return scale * config.layer_dropout * (2.0**depth - 1)


def keep_mask(rates: np.ndarray, *, num_rows: int, seed: int, step: int) -> np.ndarray:
    """True where a row of the global batch runs a layer: (num_rows, num_layers) booleans, layer 1 first."""
    drawn = np.random.default_rng([seed, STREAM, step]).random((num_rows, len(rates)))
    return drawn >= rates
