"""A network with kernels of its own, for float32 on the CPU: a range of layers is one call, whatever rows it carries.

Decoding is bound by reading weights; besides, torch's small operations take longer than a small model's products. The
kernels (kernels.cpp) read each weight once for all rows of a pass, and all threads go through a range of layers
together. What they make of a row doesn't depend on the rows beside it, nor on the number of threads, to the last bit.
Rounded weights are multiplied by rows in full precision.
Shapes: N rows, D hidden, V vocabulary.
"""

import ctypes
from collections.abc import Sequence
from ctypes import byref, c_double, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor, nn

from eellm.exits.heads import MLPBlock
from eellm.exits.lm import EarlyExitLM
from eellm.infer.attention import PassRows, Span
from eellm.infer.memory import Memory
from eellm.infer.native import structs
from eellm.infer.native.build import BuildError, library
from eellm.infer.native.rows import NativeAngles, NativeMemory, NativeRows
from eellm.infer.native.walk import COLUMNS, Walk, answers_in, make_table
from eellm.infer.network import Answer, Gone, Leg, Network
from eellm.infer.packing import Packed, once, side_by_side
from eellm.infer.quantize import Quantize, QuantizeCache
from eellm.log import log
from eellm.model import layers as model_layers
from eellm.model.rope import Rope

KERNELS_DIR = Path.home() / ".cache" / "eellm"
"""Where built kernels are kept, unless told otherwise."""
HEAD_SIZES = (16, 32, 48, 64, 80, 96, 112, 128, 192, 256)


def why_not(model: EarlyExitLM, weight: Tensor, cache_dir: Path | None) -> str | None:
    """Why the kernels can't run this model here; None: they can. Builds them where they aren't. weight: one of those
    that the network will hold."""
    config = model.config
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return f"the kernels run float32 on the CPU, and the model is {weight.dtype} on {weight.device}"
    if config.head_size not in HEAD_SIZES:
        return f"the kernels run heads of {HEAD_SIZES}, and the model's have {config.head_size}"
    try:
        library(cache_dir or KERNELS_DIR)
    except BuildError as error:
        log.warning("decoding goes without compiled kernels: %s", error)
        return str(error)
    return None


class NativeNetwork(Network):
    def __init__(
        self,
        model: EarlyExitLM,
        quantize: Quantize | None = None,
        layers: range | None = None,
        cache_dir: Path | None = None,
        packed: Packed | None = None,
    ) -> None:
        """Copies the model's weights; quantize: into matrices of so many bits. cache_dir: where those and the kernels
        are kept. packed: matrices that others have made. Raises BuildError where these can't be built."""
        super().__init__(model, layers)
        self._library = library(cache_dir or KERNELS_DIR)
        self._quantize: Quantize | None = quantize
        self._cache = None if cache_dir is None else QuantizeCache(cache_dir / "rounded")
        self._packed = packed
        self._angles = NativeAngles(Rope(self.config))
        decoder = model.decoder
        self._layers = {n: self._layer(decoder.layer(n)) for n in self.held}
        self._layer_list = (c_void_p * len(self.held))(*map(ctypes.addressof, self._layers.values()))
        is_last = self.config.num_layers in self.held
        is_shared = is_last or any(exit_config.head == "tied" for exit_config in self.exits)
        output = self._matrix(decoder.output, is_head=True) if is_shared else None
        self._outputs = {self.config.num_layers: output} if is_last else {}
        self._norms: dict[int, Tensor | None] = {self.config.num_layers: _vector(decoder.norm)} if is_last else {}
        self._bodies: dict[int, structs.Layer | structs.MLP] = {}
        for exit_config in self.exits:
            layer, exit = exit_config.layer, model.exit(exit_config.layer)
            norm = decoder.norm if exit.norm is None else exit.norm
            self._norms[layer] = None if exit_config.kind == "embed" else _vector(norm)
            self._outputs[layer] = output if exit.output is None else self._matrix(exit.output, is_head=True)
            if isinstance(exit.body, model_layers.Layer):
                self._bodies[layer] = self._layer(exit.body)
            elif isinstance(exit.body, MLPBlock):
                self._bodies[layer] = self._mlp(exit.body.norm, exit.body.mlp)
        self._heads = {layer: self._head_struct(layer) for layer in self._outputs}

    # --- what the loop calls ---

    def new_memory(self) -> NativeMemory:
        return NativeMemory(self.config, self.own_layer, self.held, dtype=self.dtype, device=self.device)

    def rows(self, spans: Sequence[Span]) -> NativeRows:
        return NativeRows(spans, self._angles)

    def run(self, h_ND: Tensor, first: int, last: int, rows: PassRows, memory: Memory) -> Tensor:
        return (
            self._run(*self._addresses(first, memory), last - first + 1, h_ND, rows, memory) if last >= first else h_ND
        )

    def walk(
        self, h_ND: Tensor, done: int, legs: Sequence[Leg], span: Span, memory: Memory, policy: str
    ) -> tuple[Tensor, list[Gone]]:
        h_ND, rows = h_ND.contiguous(), self.rows([span])
        walk = Walk(
            legs,
            done,
            policy,
            addresses=lambda first: self._addresses(first, memory),
            heads=self._heads,
            vocab_size=self.config.vocab_size,
        )
        out_ND = torch.empty_like(h_ND)
        asked_ND = h_ND.new_empty(walk.num_asked, h_ND.shape[1])
        num_gone = self._library.eellm_walk(
            walk.structs,
            c_int64(len(legs)),
            c_int64(memory.capacity),
            byref(rows.struct),
            *_pointers(h_ND, out_ND, asked_ND),
            _threads(),
        )
        return out_ND, walk.gone(num_gone)

    def attended(self, layer: int, h_ND: Tensor, rows: PassRows, memory: Memory) -> Tensor:
        body = self._bodies.get(layer)
        if not isinstance(body, structs.Layer):
            return h_ND
        own, kv = (c_void_p * 1)(ctypes.addressof(body)), (c_void_p * 1)(memory.exits[layer].data_ptr())
        return self._run(ctypes.addressof(own), ctypes.addressof(kv), 1, h_ND, rows, memory)

    def normed(self, layer: int, h_ND: Tensor) -> Tensor:
        body, norm_D = self._bodies.get(layer), self._norms[layer]
        h_ND = h_ND.contiguous()
        num_rows, hidden_size = h_ND.shape
        if isinstance(body, structs.MLP):
            out_ND = torch.empty_like(h_ND)
            self._library.eellm_mlp(byref(body), c_int64(num_rows), *_pointers(h_ND, out_ND), _threads())
            h_ND = out_ND
        if norm_D is None:
            return h_ND
        out_ND = torch.empty_like(h_ND)
        eps = c_double(self.config.rms_norm_eps)
        (weight,) = _pointers(norm_D)
        self._library.eellm_norm(weight, c_int64(hidden_size), eps, c_int64(num_rows), *_pointers(h_ND, out_ND))
        return out_ND

    def logits(self, layer: int, z_ND: Tensor) -> Tensor:
        return self._head(layer, None, z_ND, None)

    def answers(self, layer: int, h_ND: Tensor, policies: Sequence[str]) -> tuple[Tensor, list[Answer]]:
        if isinstance(self._bodies.get(layer), structs.MLP):
            h_ND, norm_D = self.normed(layer, h_ND), None
        else:
            norm_D = self._norms[layer]
        table = make_table(len(h_ND))
        logits_NV = self._head(layer, norm_D, h_ND, table)
        return logits_NV, answers_in(table, [COLUMNS[policy] for policy in policies])

    def _head(self, layer: int, norm_D: Tensor | None, x_ND: Tensor, table: "ctypes.Array[c_double] | None") -> Tensor:
        x_ND, matrix = x_ND.contiguous(), self._outputs[layer]
        assert matrix is not None, "a shared output matrix is held with the exits that share it"
        num_rows = len(x_ND)
        logits_NV = x_ND.new_empty(num_rows, self.config.vocab_size)
        self._library.eellm_head(
            None if norm_D is None else c_void_p(norm_D.data_ptr()),
            c_double(self.config.rms_norm_eps),
            byref(matrix),
            c_int64(num_rows),
            *_pointers(x_ND, logits_NV),
            table,
            _threads(),
        )
        return logits_NV

    def _run(self, layers: int, kv: int, num_layers: int, h_ND: Tensor, rows: PassRows, memory: Memory) -> Tensor:
        """layers, kv: where the addresses of the layers stand, and of their keys and values."""
        assert isinstance(rows, NativeRows), "rows are those of this network"
        h_ND = h_ND.contiguous()
        out_ND = torch.empty_like(h_ND)
        self._library.eellm_run(
            c_void_p(layers),
            c_void_p(kv),
            c_int64(num_layers),
            c_int64(memory.capacity),
            byref(rows.struct),
            *_pointers(h_ND, out_ND),
            _threads(),
        )
        return out_ND

    def _addresses(self, first: int, memory: Memory) -> tuple[int, int]:
        """Where the addresses of layers from `first` on stand, and of their keys and values."""
        offset = (first - self.held[0]) * ctypes.sizeof(c_void_p)
        assert isinstance(memory, NativeMemory), "memory is of this network"
        return ctypes.addressof(self._layer_list) + offset, memory.address() + offset

    def _head_struct(self, layer: int) -> structs.Head:
        body, norm_D, output = self._bodies.get(layer), self._norms[layer], self._outputs[layer]
        assert output is not None, "a shared output matrix is held with the exits that share it"
        return structs.Head(
            mlp=ctypes.addressof(body) if isinstance(body, structs.MLP) else None,
            norm=None if norm_D is None else norm_D.data_ptr(),
            output=ctypes.addressof(output),
            eps=self.config.rms_norm_eps,
        )

    # --- what the kernels read ---

    def _layer(self, layer: model_layers.Layer) -> structs.Layer:
        attn = layer.attn
        norms = [_vector(attn.q_norm), _vector(attn.k_norm)] if isinstance(attn.q_norm, model_layers.RMSNorm) else []
        norm_D = _vector(layer.attn_norm)
        parts = self._matrix(attn.q, attn.k, attn.v), self._matrix(attn.out), self._mlp(layer.mlp_norm, layer.mlp)
        struct = structs.Layer(
            norm=norm_D.data_ptr(),
            qkv=parts[0],
            out=parts[1],
            q_norm=norms[0].data_ptr() if norms else None,
            k_norm=norms[1].data_ptr() if norms else None,
            num_heads=attn.q.out_features // attn.head_size,
            num_kv_heads=attn.k.out_features // attn.head_size,
            head_size=attn.head_size,
            window=attn.window or 0,
            mlp=parts[2],
        )
        struct.kept = (norm_D, *norms, *parts)
        return struct

    def _mlp(self, norm: model_layers.RMSNorm, mlp: model_layers.MLP) -> structs.MLP:
        norm_D = _vector(norm)
        parts = self._matrix(mlp.gate, mlp.up, is_gated=True), self._matrix(mlp.down)
        struct = structs.MLP(
            norm=norm_D.data_ptr(),
            gate_up=parts[0],
            down=parts[1],
            activation=structs.ACTIVATIONS[self.config.activation],
            eps=norm.eps,
        )
        struct.kept = (norm_D, *parts)
        return struct

    def _matrix(self, *linears: nn.Linear, is_head: bool = False, is_gated: bool = False) -> structs.Matrix:
        """One matrix of all outputs; is_gated: of a gate's and what it gates, in turn."""
        # logits suffer most from fewer bits: a head keeps 8
        quantize: Quantize | None = "int8" if self._quantize is not None and is_head else self._quantize

        def make() -> structs.Matrix:
            weight_OI, bias_O = side_by_side(linears)
            order = structs.gate_and_up(len(weight_OI) // 2) if is_gated else structs.in_turn(len(weight_OI))
            matrix = structs.make_matrix(weight_OI, bias_O, order, quantize, self._cache)
            if len(linears) == 1:
                matrix.num_outputs = len(weight_OI)
            return matrix

        matrix = once(self._packed, ("native", quantize, is_gated), linears, make)
        self.num_bytes += matrix.num_bytes
        return matrix


def _vector(norm: nn.Module) -> Tensor:
    """A copy of a norm's weight."""
    assert isinstance(norm, model_layers.RMSNorm), "norms are RMSNorms"
    return norm.weight.detach().clone()


def _pointers(*tensors: Tensor) -> list[c_void_p]:
    return [c_void_p(tensor.data_ptr()) for tensor in tensors]


def _threads() -> c_int64:
    return c_int64(torch.get_num_threads())
