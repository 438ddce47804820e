"""EarlyExitLM: the backbone, plus exits that read its hidden states. The final head counts as the exit of layer L.

Parameter names: `decoder.…` for the backbone, `exits.<layer>.…` for the exits, so that the two can be stored apart.
What an exit shares with the final head is looked up in the backbone, not registered twice.
Shapes: B sequences, T rows, N any rows, D hidden, V vocabulary.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from eellm.config.calibrate import Certificate
from eellm.config.model import ExitConfig, ModelConfig
from eellm.exits.heads import Exit, MLPBlock
from eellm.model.decoder import Decoder
from eellm.model.init import init_weights, torch_device, torch_dtype
from eellm.model.layers import Layer, Rows
from eellm.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ExitHead:
    """An exit's way from hidden state to logits, in the two parts that its loss needs."""

    hidden: Callable[[Tensor], Tensor]
    """(B, T, D) → (B, T, D), normed. May mix rows (a `layer` exit attends)."""
    logits: Callable[[Tensor], Tensor]
    """(N, D) → (N, V): the product with `matrix`."""
    matrix: Tensor
    """The output matrix (V, D), one of `parameters`."""
    parameters: tuple[nn.Parameter, ...]
    """Everything that both parts read, each once."""


class EarlyExitLM(nn.Module):
    """A decoder with its exits. Made by `eellm.build` or `eellm.load`; `tokenizer` is set where the model has one, and
    `certificates` are those stored with its exits."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.decoder = Decoder(config)
        self.exits = nn.ModuleDict({str(e.layer): Exit(config, e) for e in config.exits})
        self.tokenizer: Tokenizer | None = None
        self.certificates: tuple[Certificate, ...] = ()

    def forward(self, tokens_BT: Tensor) -> dict[int, Tensor]:
        """Logits (B, T, V) of every exit, by layer; the final one's key is L. No cache."""
        rows = self.decoder.rows(tokens_BT.shape[1])
        return {layer: self.logits(layer, self.normed(layer, h, rows)) for layer, h in self.hiddens(tokens_BT, rows)}

    def hiddens(self, tokens_BT: Tensor, rows: Rows, last: int | None = None) -> Iterable[tuple[int, Tensor]]:
        """Yields (layer, hidden state (B, T, D)) at every exit up to layer `last`, the final one if unset."""
        h_BTD, done = self.decoder.embed(tokens_BT), 0
        for layer in (*self.config.exit_layers, self.config.num_layers):
            if last is not None and layer > last:
                return
            h_BTD = self.decoder.run(h_BTD, done + 1, layer, rows)
            done = layer
            yield layer, h_BTD

    def normed(self, layer: int, h_BTD: Tensor, rows: Rows) -> Tensor:
        """The normed hidden state of the exit at `layer`, ready for `logits`."""
        if layer == self.config.num_layers:
            return self.decoder.norm(h_BTD)
        return self._norm(layer, self.exit(layer)(h_BTD, rows))

    def logits(self, layer: int, z_ND: Tensor) -> Tensor:
        """Normed hidden states (..., D) → raw logits (..., V)."""
        return self._output(layer)(z_ND)

    def exit(self, layer: int) -> Exit:
        """The early exit at `layer`."""
        return self.exits[str(layer)]  # pyrefly: ignore[bad-return]

    def head(self, layer: int, rows: Rows) -> ExitHead:
        """The exit at `layer`, the final one included, as its loss wants it (see `eellm.exits.loss`)."""
        if layer == self.config.num_layers:
            return self._exit_head(layer, rows, [*self.decoder.norm.parameters(), *self.decoder.output.parameters()])
        shared = [] if self.exit(layer).output is not None else list(self.decoder.output.parameters())
        if self.exit(layer).config.norm == "final":
            shared += self.decoder.norm.parameters()
        own = [p for name, p in self.exit(layer).named_parameters() if not name.startswith("gate.")]
        return self._exit_head(layer, rows, [*own, *shared])

    def _exit_head(self, layer: int, rows: Rows, parameters: list[nn.Parameter]) -> ExitHead:
        return ExitHead(
            hidden=lambda h_BTD: self.normed(layer, h_BTD, rows),
            logits=lambda z_ND: self.logits(layer, z_ND),
            matrix=self._output(layer).weight,
            parameters=tuple(dict.fromkeys(parameters)),
        )

    def _output(self, layer: int) -> nn.Linear:
        """The output projection of the exit at `layer`; it has no bias."""
        own = None if layer == self.config.num_layers else self.exit(layer).output
        return self.decoder.output if own is None else own

    def _norm(self, layer: int, h_BTD: Tensor) -> Tensor:
        exit = self.exit(layer)
        if exit.config.kind == "embed":
            return h_BTD
        return self.decoder.norm(h_BTD) if exit.norm is None else exit.norm(h_BTD)


def add_exits(
    model: EarlyExitLM, exits: Iterable[ExitConfig], *, init: Literal["copy", "random"] = "copy", seed: int = 0
) -> None:
    """Adds exits to `model`, in place; those already there are not touched.

    init: `copy` starts from the model's own parts (EE-Tuning §3): final norm → norm, output matrix → own head, last
    layer → `layer` body, the MLP of the layer that comes next → `mlp` body. `random` draws matrices from
    N(0, init_std). Gates are random either way. Raises ConfigError for an exit beyond the last layer or at a layer that
    has one.
    """
    new = tuple(exits)
    model.config = model.config.with_exits((*model.config.exits, *new))
    like = model.decoder.embed.weight
    for exit_config in new:
        exit = Exit(model.config, exit_config).to(device=like.device, dtype=like.dtype)
        init_weights(exit, std=model.config.init_std, seed=seed + exit_config.layer)
        if init == "copy":
            _copy_from_backbone(exit, model.decoder)
        model.exits[str(exit_config.layer)] = exit


@torch.no_grad()
def _copy_from_backbone(exit: Exit, decoder: Decoder) -> None:
    pairs: list[tuple[nn.Module, nn.Module]] = []
    if exit.norm is not None:
        pairs.append((exit.norm, decoder.norm))
    if exit.output is not None:
        pairs.append((exit.output, decoder.output))
    if isinstance(exit.body, Layer):
        pairs.append((exit.body, decoder.layer(decoder.config.num_layers)))
    if isinstance(exit.body, MLPBlock):
        source = decoder.layer(exit.config.layer + 1)
        pairs.extend([(exit.body.norm, source.mlp_norm), (exit.body.mlp, source.mlp)])
    for target, source in pairs:
        target.load_state_dict(source.state_dict())


def build(
    config: ModelConfig, *, seed: int = 0, dtype: str = "float32", device: str | torch.device = "cpu"
) -> EarlyExitLM:
    """A model with random weights: the same for the same seed, whatever the device or dtype (up to rounding)."""
    model = EarlyExitLM(config).to(device=torch_device(device), dtype=torch_dtype(dtype)).eval()
    init_weights(model, std=config.init_std, seed=seed)
    return model
