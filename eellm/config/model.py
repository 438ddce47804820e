"""What a model is: the shape of its backbone and of its exits. Plain numbers, no torch.

Layers count from 1 everywhere: "exit 8" reads the hidden state after layer 8. The last layer's head is the final
exit; it is always there and not listed.
"""

from dataclasses import dataclass, replace
from typing import Literal, Self

from eellm.config.check import check_at_least, check_literals
from eellm.errors import ConfigError

ExitKind = Literal["embed", "norm", "mlp", "layer"]
HeadKind = Literal["tied", "own"]
NormKind = Literal["own", "final"]


@dataclass(frozen=True, kw_only=True)
class ExitConfig:
    """One early exit: what stands between the hidden state after `layer` and next-token logits."""

    layer: int
    """The layer whose output is read, 1 .. num_layers - 1."""
    kind: ExitKind = "norm"
    """Before the output matrix: nothing (`embed`), a norm, an MLP block and a norm, or a whole layer and a norm."""
    head: HeadKind = "tied"
    """The final head's output matrix, or one of its own."""
    norm: NormKind = "own"
    """A norm of its own, or the final head's (LayerSkip's exits are `kind="norm", norm="final"`)."""
    gate_size: int = 0
    """Hidden units of the gate that predicts, without the output matrix, whether this exit agrees with the final
    one. 0: no gate."""

    def __post_init__(self) -> None:
        check_literals(self)
        check_at_least(self, 1, "layer")
        check_at_least(self, 0, "gate_size")
        if self.kind == "embed" and self.norm == "final":
            raise ConfigError("norm = 'final': an 'embed' exit has no norm to share; use kind 'norm'")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding and its scaling, with the names of Hugging Face's `rope_parameters`."""

    rope_type: Literal["default", "linear", "llama3", "yarn"] = "default"
    """How frequencies are stretched for contexts longer than the pre-trained one."""
    rope_theta: float = 10000.0
    """Base of the geometric series of wavelengths."""
    factor: float = 1.0
    """How many times longer the context became (linear, llama3, yarn)."""
    original_max_position_embeddings: int | None = None
    """Context length of pre-training (llama3, yarn; yarn takes max_seq_len where this is unset)."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths longer than original / low_freq_factor are divided by `factor`."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths shorter than original / high_freq_factor stay as they are."""
    beta_fast: float = 32.0
    """yarn: frequencies that turn more often than this within the original context stay as they are."""
    beta_slow: float = 1.0
    """yarn: frequencies that turn less often than this are divided by `factor`."""
    attention_factor: float | None = None
    """yarn: factor on cos and sin; unset, 0.1 ln(factor) + 1 or what the two `mscale` give."""
    mscale: float | None = None
    """yarn: see `attention_factor`."""
    mscale_all_dim: float | None = None
    """yarn: see `attention_factor`."""
    truncate: bool = True
    """yarn: round the bounds of the blended frequencies outwards to whole ones."""

    def __post_init__(self) -> None:
        check_literals(self)
        if self.rope_type == "llama3" and self.original_max_position_embeddings is None:
            raise ConfigError("rope_type = 'llama3' needs original_max_position_embeddings")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder of the Llama family (Llama, Mistral, Qwen2, Qwen3, SmolLM2) with early exits."""

    vocab_size: int
    """Number of tokens."""
    hidden_size: int
    """Width of the residual stream."""
    intermediate_size: int
    """Width inside the gated MLP."""
    num_layers: int
    """Number of layers, L."""
    num_heads: int
    """Number of query heads."""
    num_kv_heads: int | None = None
    """Number of key/value heads (grouped-query attention); unset, as many as query heads."""
    head_dim: int | None = None
    """Width of one head; unset, hidden_size / num_heads."""
    max_seq_len: int = 2048
    """Longest context, in tokens."""
    rms_norm_eps: float = 1e-5
    """Epsilon of every RMSNorm."""
    rope: RopeConfig = RopeConfig()
    """Rotary position embedding."""
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    """Non-linearity of the gated MLP: SwiGLU, or GeGLU with the exact or the tanh GELU."""
    qkv_bias: bool = False
    """Biases on the q, k and v projections (Qwen2)."""
    attention_out_bias: bool = False
    """Bias on the attention's output projection (Llama's `attention_bias` sets both)."""
    mlp_bias: bool = False
    """Biases in the MLP."""
    qk_norm: bool = False
    """RMSNorm over each head of q and k before the rotation (Qwen3)."""
    sliding_window: int | None = None
    """Tokens that a position sees, itself included (Mistral); unset, all before it."""
    sliding_layers: tuple[int, ...] | None = None
    """The layers under `sliding_window`; unset, all of them."""
    tie_embeddings: bool = False
    """The output matrix is the embedding matrix."""
    init_std: float = 0.02
    """Standard deviation of random weights."""
    bos_token_id: int | None = None
    """Beginning of text, where the model has one."""
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end a text. None for models made by `eellm.build`."""
    exits: tuple[ExitConfig, ...] = ()
    """The early exits, in the order of their layers."""

    def __post_init__(self) -> None:
        check_literals(self)
        check_at_least(self, 1, "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")
        check_at_least(self, 1, "num_kv_heads", "head_dim", "max_seq_len", "sliding_window")
        if self.num_heads % self.kv_heads:
            raise ConfigError(f"num_heads = {self.num_heads}: must be a multiple of num_kv_heads = {self.kv_heads}")
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ConfigError(
                f"hidden_size = {self.hidden_size}: must be a multiple of num_heads = {self.num_heads}, or set head_dim"
            )
        if self.head_size % 2:
            raise ConfigError(f"head_dim = {self.head_size}: rotary embeddings need an even one")
        object.__setattr__(self, "exits", tuple(sorted(self.exits, key=lambda e: e.layer)))
        self._check_exits()

    def _check_exits(self) -> None:
        layers = [e.layer for e in self.exits]
        for layer in layers:
            if layer >= self.num_layers:
                raise ConfigError(
                    f"exit at layer {layer}: the model has {self.num_layers} layers and the last one is the final "
                    f"exit already; use 1 to {self.num_layers - 1}"
                )
            if layers.count(layer) > 1:
                raise ConfigError(f"exit at layer {layer} is given twice; a layer has one exit")

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """Layers with an early exit, ascending, without the final one."""
        return tuple(e.layer for e in self.exits)

    def window(self, layer: int) -> int | None:
        """The sliding window of `layer` (from 1), or None where it sees everything."""
        slides = self.sliding_layers is None or layer in self.sliding_layers
        return self.sliding_window if slides else None

    def with_exits(self, exits: tuple[ExitConfig, ...]) -> Self:
        """This model with `exits` instead of its own."""
        return replace(self, exits=exits)
