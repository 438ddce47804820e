"""One early exit: from the backbone's hidden state after a layer to a normed hidden state, ready for an output matrix.

kind      body                        norm
embed     —                           —
norm      —                           RMSNorm
mlp       h + MLP(RMSNorm(h))         RMSNorm
layer     a Transformer layer         RMSNorm     (the layer keeps keys and values of its own)

`norm` and `output` are None where the exit shares the final head's. The gate is a tiny classifier on the normed
hidden state: the probability that this exit's choice is the final one's, at a thousandth of the output matrix's cost.
Source: EE-LLM (arXiv 2312.04916) §3; EE-Tuning (arXiv 2402.00518) §3. Shapes: B sequences, T rows, D hidden.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from eellm.config.model import ExitConfig, ModelConfig
from eellm.model.layers import MLP, Layer, RMSNorm, Rows


class MLPBlock(nn.Module):
    """The feed-forward half of a layer, with its residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Gate(nn.Module):
    """Normed hidden state → logit of "this exit agrees with the final one"."""

    def __init__(self, hidden_size: int, gate_size: int) -> None:
        super().__init__()
        self.size = (hidden_size,)
        self.inner = nn.Linear(hidden_size, gate_size)
        self.out = nn.Linear(gate_size, 1)

    def forward(self, z_ND: Tensor) -> Tensor:
        """(..., D) → (...). The input is scaled to unit RMS, so that `embed` exits work too."""
        return self.out(F.silu(self.inner(F.rms_norm(z_ND, self.size)))).squeeze(-1)


class Exit(nn.Module):
    def __init__(self, config: ModelConfig, exit_config: ExitConfig) -> None:
        super().__init__()
        self.config = exit_config
        D = config.hidden_size
        self.body: MLPBlock | Layer | None = None
        if exit_config.kind == "mlp":
            self.body = MLPBlock(config)
        elif exit_config.kind == "layer":
            self.body = Layer(config, config.window(config.num_layers))
        own_norm = exit_config.kind != "embed" and exit_config.norm == "own"
        self.norm = RMSNorm(D, config.rms_norm_eps) if own_norm else None
        self.output = nn.Linear(D, config.vocab_size, bias=False) if exit_config.head == "own" else None
        self.gate = Gate(D, exit_config.gate_size) if exit_config.gate_size else None

    def forward(self, h_BTD: Tensor, rows: Rows) -> Tensor:
        """What the exit makes of the hidden state, before its norm."""
        if isinstance(self.body, Layer):
            return self.body(h_BTD, rows)
        return h_BTD if self.body is None else self.body(h_BTD)
