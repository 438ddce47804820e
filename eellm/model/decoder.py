"""The backbone: a plain decoder-only Transformer. It knows nothing of exits, devices or files.

tokens → `embed` → layers "1" .. "L" → `norm` → `output` → logits. Layers are keyed by their number, so that a slice of
the model (a pipeline stage) has the same parameter names as the whole. `run` moves hidden states through a range of
layers: what sits between two exits is one call.
Shapes: B sequences, T rows, D hidden, V vocabulary.
"""

import torch
from torch import Tensor, nn

from eellm.config.model import ModelConfig
from eellm.model.layers import Layer, RMSNorm, Rows
from eellm.model.rope import Rope


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.rope = Rope(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        numbers = range(1, config.num_layers + 1)
        self.layers = nn.ModuleDict({str(n): Layer(config, config.window(n)) for n in numbers})
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """Makes the output matrix the embedding matrix again, where the config says so and both are here (a pipeline
        stage may hold one of them)."""
        if self.config.tie_embeddings and hasattr(self, "embed") and hasattr(self, "output"):
            self.output.weight = self.embed.weight

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits (B, T, V) of whole sequences."""
        h_BTD = self.run(self.embed(tokens_BT), 1, self.config.num_layers, self.rows(tokens_BT.shape[1]))
        return self.output(self.norm(h_BTD))

    def run(self, h_BTD: Tensor, first: int, last: int, rows: Rows) -> Tensor:
        """Moves hidden states through layers `first` to `last`, both included."""
        for n in range(first, last + 1):
            h_BTD = self.layer(n)(h_BTD, rows)
        return h_BTD

    def layer(self, n: int) -> Layer:
        """Layer `n`, from 1."""
        return self.layers[str(n)]  # pyrefly: ignore[bad-return]

    def rows(self, num_rows: int) -> Rows:
        """The rows of whole sequences of that length."""
        weight = self.embed.weight
        positions_T = torch.arange(num_rows, device=weight.device)
        cos_TE, sin_TE = self.rope(positions_T, weight.dtype)
        return Rows(cos_TE, sin_TE, {w: causal_mask(positions_T, w) for w in self.windows})

    def packed_rows(self, positions_BT: Tensor, documents_BT: Tensor | None, dtype: torch.dtype | None = None) -> Rows:
        """Rows of packed documents: attention stays within equal document numbers of a sequence.

        documents_BT: None where each sequence is one document; then most masks are, too. dtype: of the angles; unset,
        the embedding matrix's.
        """
        cos, sin = self.rope(positions_BT[:, None], dtype or self.embed.weight.dtype)
        index_T = torch.arange(positions_BT.shape[1], device=positions_BT.device)
        if documents_BT is None:
            return Rows(cos, sin, {w: causal_mask(index_T, w) for w in self.windows})
        seen_BTT = documents_BT[:, :, None] == documents_BT[:, None, :]
        masks: dict[int | None, Tensor | None] = {}
        for window in self.windows:
            distance_TT = index_T[:, None] - index_T[None, :]
            near_TT = distance_TT >= 0 if window is None else (distance_TT >= 0) & (distance_TT < window)
            masks[window] = (seen_BTT & near_TT)[:, None]
        return Rows(cos, sin, masks)

    @property
    def windows(self) -> set[int | None]:
        """The sliding windows in use; None stands for unlimited."""
        return {self.config.window(n) for n in range(1, self.config.num_layers + 1)}


def causal_mask(positions_T: Tensor, window: int | None) -> Tensor | None:
    """True where row t may see row s: s <= t and t - s < window. None where `is_causal` says it.

    positions_T: 0 .. T - 1.
    """
    if window is None or len(positions_T) <= window:
        return None
    distance_TT = positions_T[:, None] - positions_T[None, :]
    return (distance_TT >= 0) & (distance_TT < window)
