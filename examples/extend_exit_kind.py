"""An exit kind, tried out in one file: a narrow bottleneck before the norm, an eighth as wide as the model.

    an exit of kind `norm` → its body replaced → trained on text, everything else frozen → evaluated

Whatever goes through `EarlyExitLM` takes it as it is: losses, every gradient, evaluation. Decoding doesn't: its
networks know the bodies of the kinds that there are, and an engine refuses others. docs/how-to/extend.md lists what a
kind of its own takes.
"""

from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import eellm
from eellm.config.model import ModelConfig
from eellm.model.layers import RMSNorm

LAYER = 4


class Bottleneck(nn.Module):
    """h + up(silu(down(norm(h)))); begins as the identity, for `up` begins at zero. (…, D) → (…, D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = max(1, config.hidden_size // 8)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.down = nn.Linear(config.hidden_size, width, bias=False)
        self.up = nn.Linear(width, config.hidden_size, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.up(F.silu(self.down(self.norm(h))))


def add_bottleneck(model: eellm.EarlyExitLM, layer: int) -> None:
    """An exit of kind `norm` after `layer`, with the bottleneck for a body; only that exit takes gradients."""
    eellm.add_exits(model, [eellm.ExitConfig(layer=layer, kind="norm", head="tied")])
    model.exit(layer).body = Bottleneck(model.config)
    model.requires_grad_(False)
    model.exit(layer).requires_grad_(True)


def train(model: eellm.EarlyExitLM, layer: int, rows_NT: Tensor, *, num_steps: int, lr: float = 1e-2) -> list[float]:
    """The exit's cross entropy before each step, in nats a token."""
    optimizer = torch.optim.AdamW(model.exit(layer).parameters(), lr=lr)
    losses = []
    for step in range(num_steps):
        tokens_BT = rows_NT[torch.arange(4 * step, 4 * step + 4) % len(rows_NT)]
        logits_BTV = model(tokens_BT)[layer][:, :-1]
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    torch.manual_seed(0)
    model = eellm.load("models/english-bytes")
    add_bottleneck(model, LAYER)
    tokens = torch.tensor(list(model.tokenizer.encode("\n".join(topics.values())[:40_000])))
    rows_NT = tokens[: len(tokens) // 128 * 128].view(-1, 128)
    losses = train(model, LAYER, rows_NT, num_steps=40)
    print(f"exit {LAYER}: {losses[0]:.2f} nats a byte before, {sum(losses[-5:]) / 5:.2f} after 40 steps")


if __name__ == "__main__":
    main()
