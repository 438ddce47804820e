"""What a model costs, part by part, from its config alone. Without torch.

FLOPs are those of matrix products and attention, two for a multiply and add; norms, activations, rotations and the
embedding's look-up are left out. They are the model's: what the formula asks for, however a kernel gets there. Causal
attention counts the rows that are really attended to, (T + 1) / 2 on average, so about half of what counts that ignore
the mask (torch's FlopCounterMode, PaLM's formula) give for that part. Documents packed into a row are taken for one.
"""

from dataclasses import dataclass

from eellm.config.model import ExitConfig, ModelConfig


@dataclass(frozen=True, kw_only=True)
class ForwardFlops:
    """FLOPs of a forward pass, per token of a sequence, by part."""

    layers: tuple[float, ...]
    """Of each layer with its attention, layer 1 first."""
    final_head: float
    """Of the final output matrix."""
    exits: dict[int, float]
    """Of each early exit, by layer: its body and its output matrix. Gates are left out: training doesn't run them."""

    @property
    def total(self) -> float:
        """Of a pass through all layers, the final head and every exit."""
        return sum(self.layers) + self.final_head + sum(self.exits.values())


def forward_flops_per_token(model: ModelConfig, seq_len: int) -> ForwardFlops:
    """Mean over the tokens of a sequence of `seq_len` that starts from nothing."""
    return ForwardFlops(
        layers=tuple(layer_flops(model, seq_len, model.window(n)) for n in range(1, model.num_layers + 1)),
        final_head=head_flops(model),
        exits={e.layer: exit_flops(model, e, seq_len) for e in model.exits},
    )


def train_flops_per_token(model: ModelConfig, seq_len: int, *, recompute: bool = False) -> float:
    """Forward and backward, which costs two forwards: one for the inputs' gradients and one for the weights'.

    This divided by time and by the hardware's FLOP/s is the model FLOP utilisation. recompute: count the layers'
    second forward too (`parallel.recompute = "full"`), which gives the hardware's utilisation.
    """
    flops = forward_flops_per_token(model, seq_len)
    return 3 * flops.total + (sum(flops.layers) if recompute else 0.0)


def layer_flops(model: ModelConfig, seq_len: int, window: int | None) -> float:
    """Of one layer per token: projections, attention, MLP."""
    D, E = model.hidden_size, model.head_size
    projections = 2 * D * E * (2 * model.num_heads + 2 * model.kv_heads)  # q and out, k and v
    return projections + attention_flops(model, seq_len, window) + mlp_flops(model)


def attention_flops(model: ModelConfig, seq_len: int, window: int | None) -> float:
    """Of softmax(q kᵀ) v per token, without the projections."""
    return 2 * 2 * model.num_heads * model.head_size * mean_attended(seq_len, window)


def mean_attended(seq_len: int, window: int | None) -> float:
    """Rows that a row sees, itself included, on average over the sequence."""
    seen = min(window or seq_len, seq_len)
    return (seen * (seen + 1) / 2 + (seq_len - seen) * seen) / seq_len


def mlp_flops(model: ModelConfig) -> float:
    """Of the gated MLP per token: gate, up, down."""
    return 2 * 3 * model.hidden_size * model.intermediate_size


def head_flops(model: ModelConfig) -> float:
    """Of one output matrix per token; the same whether it is shared or an exit's own."""
    return 2 * model.hidden_size * model.vocab_size


def exit_flops(model: ModelConfig, exit: ExitConfig, seq_len: int) -> float:
    """Of one early exit per token: what stands before its output matrix, and the matrix."""
    body = 0.0
    if exit.kind == "mlp":
        body = mlp_flops(model)
    elif exit.kind == "layer":
        body = layer_flops(model, seq_len, model.window(model.num_layers))
    return body + head_flops(model)
