"""What the rows of one pass attend to, and where their keys and values go.

    spans (slot, rows before, rows now) → `PackedRows`, made once a pass → `write`, `attend` in each of its layers

A pass carries N rows of any number of sequences, one sequence's rows side by side. A single sequence, or one with
many rows (a prompt), attends by itself. Sequences with few rows attend together: their slots are neighbours in
memory, so their keys are read as one batch without a copy, under a mask; rows of that batch that nobody needs are
idle.
Shapes: N rows, H query heads, K key/value heads, E head width, R slots attending together, T rows of each, S rows
attended to.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from eellm.infer.angles import Angles

FEW_ROWS = 16
"""A sequence with more rows in a pass attends by itself."""
MOST_IDLE = 3
"""Rows of a batch for each one that is needed, at most."""


class Span(NamedTuple):
    """One sequence's rows in a pass."""

    slot: int
    before: int
    """Its rows that have passed already."""
    count: int

    @property
    def end(self) -> int:
        return self.before + self.count


class PassRows:
    """The rows of one pass, in the order of `spans`."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self.spans = tuple(spans)


class LayerRows(Protocol):
    """The rows of a pass, as a layer takes them."""

    cos: Tensor
    sin: Tensor
    """(N, H + 2K, E), as `eellm.infer.angles` says."""

    def write(self, kv_SKCE: Tensor, rows_NKE: Tensor, /) -> None:
        """The rows' keys and values (2K of them) into a layer's memory."""
        ...

    def attend(self, q_NHE: Tensor, kv_SKCE: Tensor, window: int | None, /) -> Tensor:
        """(N, H, E) → (N, H · E): each row over its sequence's rows up to itself."""
        ...


class PackedRows(PassRows):
    """As torch's attention takes them."""

    def __init__(self, spans: Sequence[Span], angles: Angles, num_kv_heads: int) -> None:
        super().__init__(spans)
        self.num_kv_heads = num_kv_heads
        self.device = angles.device
        angles.reserve(max(span.end for span in self.spans))
        if len(self.spans) == 1:
            (span,) = self.spans
            self.cos, self.sin = angles.slice(span.before, span.end)
            self.slots_N = self.positions_N = None
            self.together, self.alone = None, [(0, span)]
        else:
            slots = [span.slot for span in self.spans for _ in range(span.count)]
            positions = [p for span in self.spans for p in range(span.before, span.end)]
            self.slots_N = torch.tensor(slots, device=self.device)
            self.positions_N = torch.tensor(positions, device=self.device)
            self.cos, self.sin = angles.select(self.positions_N)
            self.together, self.alone = _grouped(self.spans, self.slots_N, self.positions_N)
        self._masks: dict[tuple[int, int | None], Tensor | None] = {}

    def write(self, kv_SKCE: Tensor, rows_NKE: Tensor) -> None:
        if self.slots_N is None:
            (span,) = self.spans
            kv_SKCE[span.slot, :, span.before : span.end] = rows_NKE.transpose(0, 1)
        else:
            kv_SKCE[self.slots_N, :, self.positions_N] = rows_NKE

    def attend(self, q_NHE: Tensor, kv_SKCE: Tensor, window: int | None) -> Tensor:
        if self.together is None and len(self.alone) == 1:
            return self._attend_alone(q_NHE, kv_SKCE, window, self.alone[0][1])
        y_NHE = torch.empty_like(q_NHE)
        y_ND = y_NHE.view(len(y_NHE), -1)
        for start, span in self.alone:
            rows = slice(start, start + span.count)
            y_ND[rows] = self._attend_alone(q_NHE[rows], kv_SKCE, window, span)
        if self.together is not None:
            group = self.together
            mask = self._mask(-1, window)
            y_ND[group.rows] = group.attend(q_NHE, kv_SKCE, mask, self.num_kv_heads)
        return y_ND

    def _attend_alone(self, q_THE: Tensor, kv_SKCE: Tensor, window: int | None, span: Span) -> Tensor:
        first = 0 if window is None else max(0, span.before + 1 - window)  # no row looks further back
        K = self.num_kv_heads
        if span.count == 1:  # what decoding one sequence does most: as few steps as can be
            keys = kv_SKCE[span.slot : span.slot + 1, :K, first : span.end]
            values = kv_SKCE[span.slot : span.slot + 1, K:, first : span.end]
            y_1H1E = F.scaled_dot_product_attention(q_THE[:, :, None], keys, values, enable_gqa=q_THE.shape[1] != K)
            return y_1H1E.view(1, -1)
        kv_KSE = kv_SKCE[span.slot, :, first : span.end]
        mask = self._mask(self.spans.index(span), window)
        y_1HTE = F.scaled_dot_product_attention(
            q_THE.transpose(0, 1)[None],
            kv_KSE[None, :K],
            kv_KSE[None, K:],
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=q_THE.shape[1] != K,
        )
        return y_1HTE[0].transpose(0, 1).reshape(span.count, -1)

    def _mask(self, index: int, window: int | None) -> Tensor | None:
        """Of the span with that index, or of the group (-1). Kept: the next layer asks again."""
        key = (index, window)
        if key not in self._masks:
            dtype = self.cos.dtype
            if index < 0:
                assert self.together is not None
                self._masks[key] = additive_mask(self.together.positions_RT, 0, self.together.length, window, dtype)
            else:
                self._masks[key] = _span_mask(self.spans[index], window, dtype, self.device)
        return self._masks[key]


def _span_mask(span: Span, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """(T, S); None where `is_causal` says it."""
    first = 0 if window is None else max(0, span.before + 1 - window)
    if span.before == 0 and (window is None or span.end <= window):
        return None
    positions_T = torch.arange(span.before, span.end, device=device)
    return additive_mask(positions_T, first, span.end, window, dtype)


def additive_mask(positions: Tensor, first: int, end: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """0 where the row at a position sees row s of first .. end - 1, else -inf. positions (T) → (T, S); (R, T) → (R, 1,
    T, S)."""
    seen_S = torch.arange(first, end, device=positions.device)
    distance = positions[..., None] - seen_S
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    mask = torch.zeros(hidden.shape, dtype=dtype, device=positions.device).masked_fill_(hidden, -torch.inf)
    return mask if positions.dim() == 1 else mask[:, None]


class Together:
    """Sequences with few rows each, as one batch over neighbouring slots."""

    def __init__(self, spans: Sequence[Span], starts: Sequence[int], slots_N: Tensor, positions_N: Tensor) -> None:
        slots = [span.slot for span in spans]
        self.first, self.last = min(slots), max(slots)
        self.length = max(span.end for span in spans)
        self.num_rows = max(span.count for span in spans)
        index = [start + i for start, span in zip(starts, spans, strict=True) for i in range(span.count)]
        num_slots = self.last - self.first + 1
        everyone = len(index) == len(slots_N)
        self.rows: Tensor | slice = slice(None) if everyone else slots_N.new_tensor(index)
        """Which of the pass's rows these are."""
        self.is_dense = everyone and self.num_rows == 1 and slots == list(range(self.first, self.last + 1))
        if self.is_dense:
            self.positions_RT = positions_N[:, None]
            return
        self.slots_N = slots_N[self.rows] - self.first
        self.turns_N = slots_N.new_tensor([i for span in spans for i in range(span.count)])
        # an idle row sees its slot's first row, whatever that is: a row that sees none would be NaN
        self.positions_RT = slots_N.new_zeros(num_slots, self.num_rows)
        self.positions_RT[self.slots_N, self.turns_N] = positions_N[self.rows]

    def attend(self, q_NHE: Tensor, kv_SKCE: Tensor, mask: Tensor | None, num_kv_heads: int) -> Tensor:
        """The pass's queries → (the group's rows, H · E)."""
        kv_RKSE = kv_SKCE[self.first : self.last + 1, :, : self.length]
        keys, values = kv_RKSE[:, :num_kv_heads], kv_RKSE[:, num_kv_heads:]
        N, H, E = q_NHE.shape
        if self.is_dense:
            q_RHTE = q_NHE[:, :, None]
        else:
            q_RHTE = q_NHE.new_zeros(len(kv_RKSE), H, self.num_rows, E)
            q_RHTE[self.slots_N, :, self.turns_N] = q_NHE[self.rows]
        y_RHTE = F.scaled_dot_product_attention(q_RHTE, keys, values, attn_mask=mask, enable_gqa=num_kv_heads != H)
        if self.is_dense:
            return y_RHTE.reshape(N, H * E)
        return y_RHTE[self.slots_N, :, self.turns_N].reshape(-1, H * E)


def _grouped(
    spans: tuple[Span, ...], slots_N: Tensor, positions_N: Tensor
) -> tuple[Together | None, list[tuple[int, Span]]]:
    """Which sequences attend together, and those that attend alone, each with its first row."""
    starts = [0]
    for span in spans:
        starts.append(starts[-1] + span.count)
    few = [(start, span) for start, span in zip(starts, spans, strict=False) if span.count <= FEW_ROWS]
    many = [(start, span) for start, span in zip(starts, spans, strict=False) if span.count > FEW_ROWS]
    if len(few) > 1:
        slots = [span.slot for _, span in few]
        num_batch = (max(slots) - min(slots) + 1) * max(span.count for _, span in few)
        if num_batch <= MOST_IDLE * sum(span.count for _, span in few):
            return Together([span for _, span in few], [start for start, _ in few], slots_N, positions_N), many
    return None, few + many
