"""A network that computes with torch: on any device, in any dtype.

What reads the same row is one product (q, k, v; gate, up), each matrix is kept in the order that the machine multiplies
few rows fastest in, or quantised (`eellm.infer.weights`).
Shapes: N rows, D hidden, H query heads, K key/value heads, E head width, V vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from eellm.exits.heads import MLPBlock
from eellm.exits.lm import EarlyExitLM
from eellm.exits.policy import SCORES
from eellm.infer.angles import Angles
from eellm.infer.attention import LayerRows, PackedRows, PassRows, Span
from eellm.infer.memory import Memory
from eellm.infer.network import Answer, Network
from eellm.infer.packing import Packed, Packer, Team
from eellm.infer.quantize import Quantize
from eellm.infer.weights import Matrix
from eellm.model.layers import MLP, Layer, RMSNorm


class PackedNetwork(Network):
    def __init__(
        self,
        model: EarlyExitLM,
        quantize: Quantize | None = None,
        layers: range | None = None,
        cache_dir: Path | None = None,
        packed: Packed | None = None,
        team: Team | None = None,
    ) -> None:
        """Copies the model's weights; quantize: into matrices of so many bits. cache_dir: where those are kept. packed:
        matrices that others have made. team: those who hold the other parts of the model's matrices, where `model` has
        a part of each."""
        super().__init__(model, layers)
        decoder, packer = model.decoder, Packer(quantize, cache_dir, packed, team)
        self.angles = Angles(self.config, dtype=self.dtype, device=self.device)
        self.layers = {n: PackedLayer(decoder.layer(n), packer) for n in self.held}
        is_last = self.config.num_layers in self.held
        is_shared = is_last or any(exit_config.head == "tied" for exit_config in self.exits)
        output = packer.pack(decoder.output, is_head=True) if is_shared else None
        self.heads: dict[int, PackedHead] = {}
        if output is not None and is_last:
            self.heads[self.config.num_layers] = PackedHead(None, decoder.norm, output)
        for exit_config in self.exits:
            exit = model.exit(exit_config.layer)
            norm = None if exit_config.kind == "embed" else decoder.norm if exit.norm is None else exit.norm
            matrix = output if exit.output is None else packer.pack(exit.output, is_head=True)
            assert matrix is not None, "a shared output matrix is held with the exits that share it"
            body = None
            if isinstance(exit.body, Layer):
                body = PackedLayer(exit.body, packer)
            elif isinstance(exit.body, MLPBlock):
                body = PackedMLP(exit.body.norm, exit.body.mlp, packer)
            self.heads[exit_config.layer] = PackedHead(body, norm, matrix)
        self.num_bytes = packer.num_bytes

    def rows(self, spans: Sequence[Span]) -> PassRows:
        return PackedRows(spans, self.angles, self.config.kv_heads)

    def run(self, h_ND: Tensor, first: int, last: int, rows: PassRows, memory: Memory) -> Tensor:
        assert isinstance(rows, PackedRows), "rows are those of this network"
        for n in range(first, last + 1):
            h_ND = self.layers[n](h_ND, rows, memory.layers[n])
        return h_ND

    def attended(self, layer: int, h_ND: Tensor, rows: PassRows, memory: Memory) -> Tensor:
        assert isinstance(rows, PackedRows), "rows are those of this network"
        body = self.heads[layer].body
        return body(h_ND, rows, memory.exits[layer]) if isinstance(body, PackedLayer) else h_ND

    def normed(self, layer: int, h_ND: Tensor) -> Tensor:
        head = self.heads[layer]
        if isinstance(head.body, PackedMLP):
            h_ND = head.body(h_ND)
        return h_ND if head.norm is None else head.norm(h_ND)

    def logits(self, layer: int, z_ND: Tensor) -> Tensor:
        return self.heads[layer].output(z_ND).float()

    def answers(self, layer: int, h_ND: Tensor, policies: Sequence[str]) -> tuple[Tensor, list[Answer]]:
        logits_NV = self.logits(layer, self.normed(layer, h_ND))
        return logits_NV, answers_of(logits_NV, policies)


def answers_of(logits_NV: Tensor, policies: Sequence[str]) -> list[Answer]:
    """What raw float32 logits say, row by row."""
    return answers_from(answer_table(logits_NV, policies))  # one look at the device's results


def answer_table(logits_NV: Tensor, policies: Sequence[str]) -> Tensor:
    """An answer in numbers: raw float32 logits → (N, 2 + policies), float64: token, log-probability, scores."""
    tokens_N1 = logits_NV.max(dim=-1, keepdim=True).indices
    logprobs_N = logits_NV.log_softmax(-1).gather(-1, tokens_N1)[:, 0]
    columns = [tokens_N1[:, 0].double(), logprobs_N.double()]
    for policy in policies:
        score_N = logprobs_N.exp().clamp(max=1) if policy == "max_prob" else SCORES[policy](logits_NV)
        columns.append(score_N.double())
    return torch.stack(columns, dim=-1)


def answers_from(table: Tensor) -> list[Answer]:
    """From what `answer_table` made. Waits for the device it is on."""
    return [(int(row[0]), row[1], row[2:]) for row in table.tolist()]


class PackedHead:
    """An exit, the final one included."""

    def __init__(self, body: "PackedLayer | PackedMLP | None", norm: RMSNorm | None, output: Matrix) -> None:
        self.body = body
        self.norm = None if norm is None else Norm(norm)
        self.output = output


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
        self.down = packer.pack(mlp.down, is_summed=True)
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
        self.out = packer.pack(attn.out, is_summed=True)
        self.mlp = PackedMLP(layer.mlp_norm, layer.mlp, packer)
        self.head_size, self.window = attn.head_size, attn.window
        self.num_heads = attn.q.out_features // attn.head_size
        self.num_kv_heads = attn.k.out_features // attn.head_size
        self.q_norm = Norm(attn.q_norm) if isinstance(attn.q_norm, RMSNorm) else None
        self.k_norm = Norm(attn.k_norm) if isinstance(attn.k_norm, RMSNorm) else None

    def __call__(self, x_ND: Tensor, rows: LayerRows, kv_SKCE: Tensor) -> Tensor:
        E, H, K = self.head_size, self.num_heads, self.num_kv_heads
        qkv_NHE = self.qkv(self.norm(x_ND)).view(len(x_ND), H + 2 * K, E)
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = qkv_NHE.split((H, K, K), dim=1)
            qkv_NHE = torch.cat((self.q_norm(q), self.k_norm(k), v), dim=1)
        qkv_NHE = torch.addcmul(qkv_NHE * rows.cos, qkv_NHE.roll(E // 2, dims=-1), rows.sin)
        rows.write(kv_SKCE, qkv_NHE[:, H:])
        y_ND = rows.attend(qkv_NHE[:, :H], kv_SKCE, self.window)
        return self.mlp(x_ND + self.out(y_ND))
