"""What every exit says of every target row of a text, and what an exit rule would make of it.

`exit_table` runs the backbone once over packed rows and keeps of each exit's logits three numbers a row: the loss, the
choice, the scores. Any threshold can then be judged without running the model again: the text is given (teacher
forcing), so a row's exits don't depend on those of the rows before it, and the row leaves at the exit at which
`generate` would leave. Logits exist for a chunk of target rows of one exit at a time.
Shapes: B sequences, T rows, N target rows (all of them, in order), D hidden, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from eellm.config.infer import GenerateConfig, Threshold, thresholds_by_layer
from eellm.errors import ConfigError, DataError, ModelError
from eellm.exits.lm import EarlyExitLM
from eellm.exits.loss import IGNORE, cross_entropy
from eellm.exits.policy import SCORES
from eellm.model.layers import Rows

POLICIES = (*SCORES, "gate")


class PackedBatch(Protocol):
    """Packed rows of text, as `eellm.data.loader.Batch` has them; all int64, on the model's device."""

    @property
    def tokens_BT(self) -> Tensor: ...  # noqa: N802
    @property
    def labels_BT(self) -> Tensor: ...  # noqa: N802
    @property
    def positions_BT(self) -> Tensor: ...  # noqa: N802
    @property
    def documents_BT(self) -> Tensor: ...  # noqa: N802
    @property
    def is_packed(self) -> bool: ...


@dataclass(frozen=True, eq=False)
class ExitRows:
    """What one exit says of every target row. On the CPU."""

    nll_N: Tensor
    """Negative log-likelihood of the label, float32."""
    choice_N: Tensor
    """The likeliest token's id."""
    scores: dict[str, Tensor]
    """By policy, how sure the exit is, float32 (N,). `gate` is there where the exit has one; the final exit's is 1."""


@dataclass(frozen=True)
class PolicyPoint:
    """A text under one exit rule. Means and shares over its target rows."""

    threshold: Threshold
    policy: str
    taken: dict[int, float]
    """Share of rows that leave at each exit, the final one included."""
    agreement: float
    """Share of rows whose exit makes the final exit's choice."""
    agreement_by_exit: dict[int, float]
    """The same among the rows that leave at each exit: its precision. 1 where none does."""
    accuracy: float
    """Share of rows whose exit chooses the text's next token."""
    nll: float
    perplexity: float
    mean_exit_layer: float


@dataclass(frozen=True, eq=False)
class ExitTable:
    labels_N: Tensor
    exits: dict[int, ExitRows]
    """By layer, the final exit last."""

    @property
    def final(self) -> int:
        """The final exit's layer."""
        return max(self.exits)

    def nll(self, layer: int) -> float:
        """Mean negative log-likelihood of the text at one exit, in nats a token."""
        return float(self.exits[layer].nll_N.double().mean())

    def perplexity(self, layer: int) -> float:
        """exp of `nll`."""
        return _exp(self.nll(layer))

    def agreement(self, layer: int) -> float:
        """Share of rows whose choice is the final exit's."""
        return _share(self.exits[layer].choice_N == self.exits[self.final].choice_N)

    def accuracy(self, layer: int) -> float:
        """Share of rows whose choice is the label."""
        return _share(self.exits[layer].choice_N == self.labels_N)

    def exit_taken(self, threshold: Threshold, policy: str = "max_prob", exits: Sequence[int] | None = None) -> Tensor:
        """The layer at which each row leaves, (N,): the first exit in use that is sure enough, or the final one.

        threshold, exits: as for `generate`. Raises ConfigError for an exit or score that the table doesn't have.
        """
        chosen = None if exits is None else tuple(exits)
        options = GenerateConfig(policy=policy, threshold=threshold, exits=chosen)  # pyrefly: ignore[bad-argument-type]
        taken_N = torch.full_like(self.labels_N, self.final)
        for layer, tau in thresholds_by_layer(options, tuple(self.exits)[:-1]).items():
            score_N = self.exits[layer].scores.get(policy)
            if score_N is None:
                raise ConfigError(f"policy = {policy!r}: there is no such score of the exit at layer {layer}")
            # NOTE in float64: torch would round the threshold to float32, and `generate` doesn't
            taken_N[(taken_N == self.final) & (score_N.double() >= tau)] = layer
        return taken_N

    def answers(self, taken_N: Tensor) -> tuple[Tensor, Tensor]:
        """What rows that leave at these layers choose, and the label's negative log-likelihood there in float64."""
        choice_N, nll_N = self.exits[self.final].choice_N.clone(), self.exits[self.final].nll_N.double()
        for layer, rows in self.exits.items():
            leaves_N = taken_N == layer
            choice_N[leaves_N], nll_N[leaves_N] = rows.choice_N[leaves_N], rows.nll_N[leaves_N].double()
        return choice_N, nll_N

    def at_threshold(
        self, threshold: Threshold, policy: str = "max_prob", exits: Sequence[int] | None = None
    ) -> PolicyPoint:
        """The text under one exit rule. Arguments and errors are those of `exit_taken`."""
        taken_N = self.exit_taken(threshold, policy, exits)
        choice_N, nll_N = self.answers(taken_N)
        agrees_N = choice_N == self.exits[self.final].choice_N
        nll = float(nll_N.mean())
        return PolicyPoint(
            threshold=threshold,
            policy=policy,
            taken={layer: _share(taken_N == layer) for layer in self.exits},
            agreement=_share(agrees_N),
            agreement_by_exit={layer: _share(agrees_N[taken_N == layer]) for layer in self.exits},
            accuracy=_share(choice_N == self.labels_N),
            nll=nll,
            perplexity=_exp(nll),
            mean_exit_layer=float(taken_N.double().mean()),
        )


def exit_table(
    model: EarlyExitLM, batches: Iterable[PackedBatch], *, policies: Sequence[str] = POLICIES, chunk_size: int = 512
) -> ExitTable:
    """Asks every exit of `model` about every target row of `batches`.

    policies: the scores to keep. chunk_size: rows whose logits exist at a time. Raises DataError where no row has a
    target, ModelError for an exit whose logits are no numbers.
    """
    assert set(policies) <= set(POLICIES), policies
    layers = (*model.config.exit_layers, model.config.num_layers)
    parts: dict[int, list[ExitRows]] = {layer: [] for layer in layers}
    labels: list[Tensor] = []
    for batch in batches:
        with torch.inference_mode():
            rows = model.decoder.packed_rows(batch.positions_BT, batch.documents_BT)
            labels.append(batch.labels_BT[batch.labels_BT != IGNORE].cpu())
            for layer, h_BTD in model.hiddens(batch.tokens_BT, rows):
                said = ask_exit(model, layer, h_BTD, rows, batch, policies, chunk_size)
                if said.nll_N.isnan().any():  # NaN chooses what NaN chooses: the exits would agree
                    raise ModelError.no_numbers(layer)
                parts[layer].append(said)
    if not sum(map(len, labels)):
        raise DataError("the text has no token to be predicted; give more of it")
    return ExitTable(torch.cat(labels), {layer: join_rows(parts[layer]) for layer in layers})


def ask_exit(
    model: EarlyExitLM,
    layer: int,
    h_BTD: Tensor,
    rows: Rows,
    batch: PackedBatch,
    policies: Sequence[str],
    chunk_size: int = 512,
) -> ExitRows:
    """Asks one exit, the final one included, about the target rows of one batch; h_BTD: the hidden state that it reads.

    rows: those of the batch. Call it without gradients."""
    is_target_BT = batch.labels_BT != IGNORE
    # NOTE all rows: a `layer` exit attends to those without a target too
    z_ND = model.normed(layer, h_BTD, rows)[is_target_BT]
    chunks = zip(z_ND.split(chunk_size), batch.labels_BT[is_target_BT].split(chunk_size), strict=True)
    return join_rows([_ask(model, layer, *chunk, policies) for chunk in chunks])


def _ask(model: EarlyExitLM, layer: int, z_ND: Tensor, labels_N: Tensor, policies: Sequence[str]) -> ExitRows:
    logits_NV = model.logits(layer, z_ND).float()
    scores = {policy: SCORES[policy](logits_NV).cpu() for policy in policies if policy in SCORES}
    if "gate" in policies and (gate_N := _gate_score(model, layer, z_ND)) is not None:
        scores["gate"] = gate_N.cpu()
    return ExitRows(cross_entropy(logits_NV, labels_N).cpu(), logits_NV.argmax(-1).cpu(), scores)


def _gate_score(model: EarlyExitLM, layer: int, z_ND: Tensor) -> Tensor | None:
    if layer == model.config.num_layers:
        return torch.ones(len(z_ND), dtype=torch.float32)
    gate = model.exit(layer).gate
    return None if gate is None else gate(z_ND).float().sigmoid()


def join_rows(parts: Sequence[ExitRows]) -> ExitRows:
    """Parts of one exit's rows, in order, as one."""
    scores = {policy: torch.cat([part.scores[policy] for part in parts]) for policy in parts[0].scores}
    return ExitRows(torch.cat([p.nll_N for p in parts]), torch.cat([p.choice_N for p in parts]), scores)


def _share(is_so_N: Tensor) -> float:
    """Share of true values; 1 of none."""
    return float(is_so_N.double().mean()) if len(is_so_N) else 1.0


def _exp(value: float) -> float:
    """Like math.exp, but inf instead of an error."""
    return float(torch.tensor(value, dtype=torch.float64).exp())
