"""Asking an exit about some rows: which it is sure of, and what it says of these.

Under the gate policy the output matrix runs only for rows whose gate fires. The decode loop and the workers of a
pipeline ask in the same way.
Shapes: N rows of a pass, n of them, D hidden.
"""

from collections.abc import Sequence

from torch import Tensor

from eellm.infer.attention import PassRows, Span
from eellm.infer.memory import Memory
from eellm.infer.network import Network
from eellm.infer.readout import Reading, read


def ask(
    network: Network, layer: int, h_nD: Tensor, policies: Sequence[str], thresholds: Sequence[float]
) -> tuple[dict[int, Reading], list[int], dict[int, float]]:
    """What the exit at `layer` says of the rows that it is sure of, by row; the rows that its output matrix read; and
    the scores of those that it isn't sure of.

    h_nD: hidden states after that layer, through the exit's own layer where it has one. policies, thresholds: of each
    row; an exit is sure at a score of at least the threshold.
    """
    gated = [i for i, policy in enumerate(policies) if policy == "gate"]
    gates: dict[int, float] = {}
    if gated:
        scores = network.gate(layer, network.normed(layer, rows_of(h_nD, gated))).tolist()
        gates = dict(zip(gated, scores, strict=True))
    asked = [i for i, threshold in enumerate(thresholds) if gates.get(i, threshold) >= threshold]
    unsure = {i: score for i, score in gates.items() if i not in asked}
    if not asked:
        return {}, asked, unsure
    sure = {}
    for i, reading in zip(asked, read(network, layer, rows_of(h_nD, asked), [policies[i] for i in asked]), strict=True):
        if i in gates:
            sure[i] = Reading(layer, gates[i], reading.token, reading.logprob, reading.logits_V)
        elif reading.score >= thresholds[i]:
            sure[i] = reading
        else:
            unsure[i] = reading.score
    return sure, asked, unsure


def through_own_layer(
    network: Network,
    layer: int,
    h_ND: Tensor,
    rows: PassRows,
    spans: Sequence[Span],
    index: Sequence[int],
    memory: Memory,
) -> Tensor:
    """Takes rows of a pass through the exit's own layer. Others stay as they are.

    rows: the whole pass. spans, index: of the rows that go through; `index` says which of the pass's they are.
    """
    if len(index) == len(h_ND):
        return network.attended(layer, h_ND, rows, memory)
    if not index:
        return h_ND
    out_ND = h_ND.clone()
    some = network.rows(spans)
    out_ND[list(index)] = network.attended(layer, h_ND[list(index)], some, memory)
    return out_ND


def rows_of(h_ND: Tensor, index: Sequence[int]) -> Tensor:
    """Some rows; no copy where they are all, or one."""
    if len(index) == 1:
        return h_ND[index[0] : index[0] + 1]
    return h_ND if list(index) == list(range(len(h_ND))) else h_ND[list(index)]
