"""The model as decoding runs it: N rows of any sequences at once, through any range of layers.

What reads the same row is one product (q, k, v; gate, up), each matrix is kept in the order that the machine multiplies
few rows fastest in, or quantised (`eellm.infer.weights`). The values are those of `EarlyExitLM`, whose memory and names
this leaves alone: it is made of copies.
Shapes: N rows, D hidden, H query heads, K key/value heads, E head width, V vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eellm.exits.heads import MLPBlock
from eellm.exits.lm import EarlyExitLM
from eellm.infer.attention import PassRows
from eellm.infer.costs import StepCosts
from eellm.infer.memory import Memory
from eellm.infer.packing import Packer
from eellm.infer.quantize import Quantize
from eellm.infer.weights import Matrix
from eellm.model.layers import MLP, Layer, RMSNorm

# a memo: what is in it follows from the model's weights, and goes when the model goes
_NETWORKS: WeakKeyDictionary[EarlyExitLM, dict[Quantize | None, tuple[object, "Network"]]] = WeakKeyDictionary()


def network_of(model: EarlyExitLM, quantize: Quantize | None = None, cache_dir: Path | None = None) -> "Network":
    """The model's network; made anew when its weights have changed since. cache_dir: where rounded weights are kept."""
    state = tuple((name, p.data_ptr(), p._version) for name, p in model.named_parameters())
    made = _NETWORKS.setdefault(model, {})
    if quantize not in made or made[quantize][0] != state:
        made[quantize] = (state, Network(model, quantize, cache_dir=cache_dir))
    return made[quantize][1]


class Network:
    def __init__(
        self,
        model: EarlyExitLM,
        quantize: Quantize | None = None,
        layers: range | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        """Copies the model's weights; quantize: into matrices of so many bits. layers: unset, all; of some, with their
        exits, the first comes with the embedding and the last with the final exit. What isn't held isn't read."""
        decoder, packer = model.decoder, Packer(quantize, cache_dir)
        self.config = model.config
        held = layers or range(1, self.config.num_layers + 1)
        self.embedding_VD = decoder.embed.weight.detach() if 1 in held else None
        self.layers = {n: PackedLayer(decoder.layer(n), packer) for n in held}
        exits = [exit_config for exit_config in self.config.exits if exit_config.layer in held]
        is_last = self.config.num_layers in held
        is_shared = is_last or any(exit_config.head == "tied" for exit_config in exits)
        output = packer.pack(decoder.output, is_head=True) if is_shared else None
        self.heads: dict[int, PackedHead] = {}
        if output is not None and is_last:
            self.heads[self.config.num_layers] = PackedHead(None, decoder.norm, output, None)
        for exit_config in exits:
            exit = model.exit(exit_config.layer)
            norm = None if exit_config.kind == "embed" else decoder.norm if exit.norm is None else exit.norm
            matrix = output if exit.output is None else packer.pack(exit.output, is_head=True)
            assert matrix is not None, "a shared output matrix is held with the exits that share it"
            body = None
            if isinstance(exit.body, Layer):
                body = PackedLayer(exit.body, packer)
            elif isinstance(exit.body, MLPBlock):
                body = PackedMLP(exit.body.norm, exit.body.mlp, packer)
            self.heads[exit_config.layer] = PackedHead(body, norm, matrix, exit.gate)
        norm_weight = decoder.layer(held[0]).attn_norm.weight
        self.device, self.dtype = norm_weight.device, norm_weight.dtype
        self.num_bytes = packer.num_bytes
        self.costs: StepCosts | None = None
        """What its parts take here, once somebody has measured it."""

    @property
    def own_layer(self) -> tuple[int, ...]:
        """Layers of the exits that keep keys and values of their own."""
        return tuple(n for n, head in self.heads.items() if isinstance(head.body, PackedLayer))

    def embed(self, tokens: Sequence[int]) -> Tensor:
        """(N, D)."""
        assert self.embedding_VD is not None, "tokens go in where the first layer is"
        return F.embedding(torch.tensor(tokens, device=self.device), self.embedding_VD)

    def run(self, h_ND: Tensor, first: int, last: int, rows: PassRows, memory: Memory) -> Tensor:
        """Moves the rows through layers `first` to `last`, both included; their keys and values are kept."""
        for n in range(first, last + 1):
            h_ND = self.layers[n](h_ND, rows, memory.layers[n])
        return h_ND

    def normed(self, layer: int, h_ND: Tensor) -> Tensor:
        """What the exit after `layer` makes of hidden states, ready for its output matrix. Not for exits with a layer
        of their own: see `attended`."""
        head = self.heads[layer]
        if isinstance(head.body, PackedMLP):
            h_ND = head.body(h_ND)
        return h_ND if head.norm is None else head.norm(h_ND)

    def attended(self, layer: int, h_ND: Tensor, rows: PassRows, memory: Memory) -> Tensor:
        """Hidden states → what the exit's own layer makes of them, for `normed`. All rows that pass the exit must."""
        body = self.heads[layer].body
        return body(h_ND, rows, memory.exits[layer]) if isinstance(body, PackedLayer) else h_ND

    def gate(self, layer: int, z_ND: Tensor) -> Tensor:
        """Normed hidden states → (N,): how likely the exit agrees with the final one."""
        gate = self.heads[layer].gate
        assert gate is not None, "the engine refuses the gate policy for exits without one"
        return gate(z_ND).float().sigmoid()

    def logits(self, layer: int, z_ND: Tensor) -> Tensor:
        """Normed hidden states → raw logits (N, V), float32."""
        return self.heads[layer].output(z_ND).float()


class PackedHead:
    """An exit, the final one included."""

    def __init__(
        self, body: "PackedLayer | PackedMLP | None", norm: RMSNorm | None, output: Matrix, gate: nn.Module | None
    ) -> None:
        self.body = body
        self.norm = None if norm is None else Norm(norm)
        self.output = output
        self.gate = gate


class Norm:
    """RMSNorm. For few rows the length of a row is quicker to have than torch's own norm (docs/log.md)."""

    def __init__(self, norm: RMSNorm) -> None:
        self.size, self.eps, self.weight = norm.size, norm.eps, norm.weight.detach().clone()
        self.is_exact = self.weight.dtype in (torch.float32, torch.float64)
        self.eps_1 = torch.full((1,), self.eps, dtype=self.weight.dtype, device=self.weight.device)
        self.share = 1 / norm.size[0]

    def __call__(self, x: Tensor) -> Tensor:
        if not self.is_exact:  # lower precisions compute it in float32
            return F.rms_norm(x, self.size, self.weight, self.eps)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (x * torch.addcmul(self.eps_1, length, length, value=self.share).rsqrt_()).mul_(self.weight)


class PackedMLP:
    """x + MLP(norm(x))."""

    def __init__(self, norm: RMSNorm, mlp: MLP, packer: Packer) -> None:
        self.norm = Norm(norm)
        self.gate_up = packer.pack(mlp.gate, mlp.up)
        self.down = packer.pack(mlp.down)
        self.activation = mlp.activation

    def __call__(self, x_ND: Tensor) -> Tensor:
        gate, up = self.gate_up(self.norm(x_ND)).chunk(2, dim=-1)
        return x_ND + self.down(self.activation(gate).mul_(up))


class PackedLayer:
    """A Transformer layer over the rows of a pass."""

    def __init__(self, layer: Layer, packer: Packer) -> None:
        attn = layer.attn
        self.norm = Norm(layer.attn_norm)
        self.qkv = packer.pack(attn.q, attn.k, attn.v)
        self.out = packer.pack(attn.out)
        self.mlp = PackedMLP(layer.mlp_norm, layer.mlp, packer)
        self.head_size, self.window = attn.head_size, attn.window
        self.num_heads = attn.q.out_features // attn.head_size
        self.num_kv_heads = attn.k.out_features // attn.head_size
        self.q_norm = Norm(attn.q_norm) if isinstance(attn.q_norm, RMSNorm) else None
        self.k_norm = Norm(attn.k_norm) if isinstance(attn.k_norm, RMSNorm) else None

    def __call__(self, x_ND: Tensor, rows: PassRows, kv_SKCE: Tensor) -> Tensor:
        E, H, K = self.head_size, self.num_heads, self.num_kv_heads
        qkv_NHE = self.qkv(self.norm(x_ND)).view(len(x_ND), H + 2 * K, E)
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = qkv_NHE.split((H, K, K), dim=1)
            qkv_NHE = torch.cat((self.q_norm(q), self.k_norm(k), v), dim=1)
        qkv_NHE = torch.addcmul(qkv_NHE * rows.cos, qkv_NHE.roll(E // 2, dims=-1), rows.sin)
        rows.write(kv_SKCE, qkv_NHE[:, H:])
        y_ND = rows.attend(qkv_NHE[:, :H], kv_SKCE, self.window)
        return self.mlp(x_ND + self.out(y_ND))
