"""Whether a model suits early exits: what every layer would say of a text, what an exit costs here, and what follows.

    model, text → final head on every layer (logit lens) → LayerChoices ┐
                → small exits, tuned for a few steps → LayerChoices     ├→ advise → Suitability
                → parts timed on this machine → PartCosts               ┘

The probes are exits on a model that shares the backbone: nothing is copied, and the model stays as it is.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from eellm.config.check import check_at_least, check_fraction
from eellm.config.model import ExitConfig, ExitKind
from eellm.data.loader import Loader, batches
from eellm.data.packing import Rows
from eellm.errors import ConfigError, DataError
from eellm.evaluate.advice import Advice, LayerChoices, PartCosts, advise
from eellm.exits.lm import EarlyExitLM, add_exits
from eellm.exits.loss import IGNORE, CrossEntropy, exit_loss_node, nothing
from eellm.exits.metrics import ExitTable, exit_table
from eellm.infer.costs import Curve
from eellm.infer.measure import measure
from eellm.infer.prepare import make_network
from eellm.log import log

GATE_SIZE = 64
"""Of the gate that is timed, as `eellm tune` makes them."""
MAX_PROBES = 8
"""Layers whose probes are tuned, evenly spaced."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuitConfig:
    """What is looked at, and how closely."""

    batch_size: int = 4
    """Rows in a batch."""
    precision: float = 0.98
    """Share of right choices that thresholds must keep among the tokens that leave."""
    tune_steps: int = 0
    """Steps in which small exits learn the final choice; 0: the logit lens alone."""
    tune_lr: float = 1e-3
    chunk_size: int = 256
    """Rows of one layer whose logits exist at a time."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "batch_size", "chunk_size")
        check_at_least(self, 0, "tune_steps")
        check_fraction(self, "precision")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probed:
    """What one kind of probe found."""

    name: str
    """`logit lens`, `own exits` or `tuned`."""
    choices: LayerChoices
    costs: PartCosts
    advice: Advice


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suitability:
    num_tokens: int
    num_layers: int
    precision: float
    probes: tuple[Probed, ...]
    """The logit lens, the exits that the model has, exits tuned for this: what there is. The last one's advice is the
    answer."""
    machine: dict[str, Any]
    """Load averages before and after, threads, processors, device, dtype."""

    @property
    def advice(self) -> Advice:
        return self.probes[-1].advice

    def as_json(self) -> dict[str, Any]:
        """Plain data: what the table, the page and the picture read."""
        return {
            "num_tokens": self.num_tokens,
            "num_layers": self.num_layers,
            "precision": self.precision,
            "probes": [_probe_json(probe, self.precision) for probe in self.probes],
            "advice": dataclasses.asdict(self.advice),
            "machine": self.machine,
        }


def _probe_json(probe: Probed, precision: float) -> dict[str, Any]:
    choices, costs = probe.choices, probe.costs
    layers = (*choices.layers, choices.num_layers)
    depths = {stays: choices.ideal_depths(stays=stays) for stays in (False, True)}
    return {
        "name": probe.name,
        "layers": list(layers),
        "agreement": [*choices.agreement().values(), 1.0],
        "surely_right": [choices.sure_shares((layer,), precision)[layer] for layer in choices.layers],
        "first_right": [float((depths[False] == layer).mean()) for layer in layers],
        "settled": [float((depths[True] == layer).mean()) for layer in layers],
        "mean_first_right": float(depths[False].mean()),
        "mean_settled": float(depths[True].mean()),
        "costs_s": {
            "layer": costs.layer_s.at(1),
            "final_head": costs.head_s.at(1),
            "exit": costs.exit_s.at(1),
            "gate": costs.gate_s.at(1),
            "overhead": costs.overhead_s,
        },
        "advice": dataclasses.asdict(probe.advice),
    }


def suit(
    model: EarlyExitLM,
    rows: Rows,
    config: SuitConfig = SuitConfig(),
    *,
    tune_rows: Rows | None = None,
    costs: dict[ExitKind, PartCosts] | None = None,
) -> Suitability:
    """Looks at every layer of `model` on a text.

    tune_rows: of another text, for tune_steps. costs: by kind of exit, `norm` for the untuned and `mlp` for the tuned
    ones, and that of the model's own; measured where not given. Raises ConfigError for models of one layer, DataError
    for texts without targets.
    """
    last = model.config.num_layers
    if last < 2:
        raise ConfigError("the model has one layer, and an exit needs one behind it")
    load_before = os.getloadavg()[0]
    if costs is None:
        kinds: list[ExitKind] = ["norm", _dearest(model), *(["mlp"] if config.tune_steps else [])]
        costs = {kind: measure_parts(model, kind) for kind in dict.fromkeys(kinds)}
    lens = probe_model(model, [ExitConfig(layer=layer, norm="final") for layer in range(1, last)])
    log.info(f"the final head on each of {last} layers")
    table = _ask(lens, rows, config)
    probes = [_probed("logit lens", table, costs["norm"], config)]
    if model.config.exits:
        probes.append(_probed("own exits", _ask(model, rows, config), costs[_dearest(model)], config))
    if config.tune_steps:
        if tune_rows is None:
            raise DataError("tune_steps: needs text of its own to tune on; give a longer one")
        tuned = tuned_probes(model, tune_rows, config)
        probes.append(_probed("tuned", _ask(tuned, rows, config), costs["mlp"], config))
    weight = model.decoder.embed.weight
    return Suitability(
        num_tokens=len(table.labels_N),
        num_layers=last,
        precision=config.precision,
        probes=tuple(probes),
        machine={
            "load_average": [load_before, os.getloadavg()[0]],
            "num_threads": torch.get_num_threads(),
            "num_cpus": os.cpu_count(),
            "device": str(weight.device),
            "dtype": str(weight.dtype).removeprefix("torch."),
        },
    )


def _dearest(model: EarlyExitLM) -> ExitKind:
    """The kind of the model's exits that costs the most; `norm` where it has none."""
    order: tuple[ExitKind, ...] = ("norm", "mlp", "layer")
    return max((exit.kind for exit in model.config.exits if exit.kind in order), key=order.index, default="norm")


def probe_model(model: EarlyExitLM, exits: Sequence[ExitConfig]) -> EarlyExitLM:
    """The same backbone under other exits."""
    with torch.device("meta"):  # a backbone of its own would be made only to be dropped
        probe = EarlyExitLM(model.config.with_exits(()))
    probe.decoder, probe.tokenizer = model.decoder, model.tokenizer
    add_exits(probe, exits)
    return probe.eval()


def measure_parts(model: EarlyExitLM, kind: ExitKind) -> PartCosts:
    """Times a pass through a model with one such exit in the middle; a layer is the mean of all."""
    last = model.config.num_layers
    middle = last // 2
    probe = probe_model(model, [ExitConfig(layer=middle, kind=kind, gate_size=GATE_SIZE)])
    log.info(f"timing a pass with an exit of kind {kind}")
    step = measure(make_network(probe))
    first, second = step.segment_s
    layer_s = tuple((one + other) / last for one, other in zip(first.seconds, second.seconds, strict=True))
    return PartCosts(
        num_layers=last,
        layer_s=Curve(first.rows, layer_s),
        head_s=step.head_s[last],
        exit_s=step.head_s[middle],
        gate_s=step.gate_s[middle],
        overhead_s=step.overhead_s,
    )


def tuned_probes(model: EarlyExitLM, rows: Rows, config: SuitConfig) -> EarlyExitLM:
    """Small exits (`mlp`, tied) at evenly spaced layers, after some steps of learning what the final head would say.

    The backbone stands still, so each exit learns by itself; Adam, a batch a step.
    """
    last = model.config.num_layers
    layers = sorted({round(n * last / (MAX_PROBES + 1)) for n in range(1, MAX_PROBES + 1)} & set(range(1, last)))
    probe = probe_model(model, [ExitConfig(layer=layer, kind="mlp") for layer in layers])
    optimizer = torch.optim.Adam(probe.exits.parameters(), lr=config.tune_lr)
    loader = Loader(rows, batch_size=min(config.batch_size, len(rows)), seed=0)
    device = model.decoder.embed.weight.device
    with _frozen(probe):
        for step in range(1, config.tune_steps + 1):
            _learn(probe, loader.next().to(device), config.chunk_size)
            optimizer.step()
            optimizer.zero_grad()
            if 10 * step // config.tune_steps > 10 * (step - 1) // config.tune_steps:
                log.info(f"tuned {step} of {config.tune_steps} steps")
    return probe


def _learn(probe: EarlyExitLM, batch: Any, chunk_size: int) -> None:
    """Gradients of all probes on one batch: each is to choose what the final head chooses."""
    with torch.no_grad():
        rows = probe.decoder.packed_rows(batch.positions_BT, batch.documents_BT)
        hiddens = dict(probe.hiddens(batch.tokens_BT, rows))
        z_ND = probe.normed(probe.config.num_layers, hiddens[probe.config.num_layers], rows).flatten(0, 1)
        chunks = [probe.logits(probe.config.num_layers, z).argmax(-1) for z in z_ND.split(chunk_size)]
        labels_N = torch.where(batch.labels_BT.flatten() == IGNORE, IGNORE, torch.cat(chunks))
    weight = 1 / max(int((labels_N != IGNORE).sum()), 1)
    for layer in probe.config.exit_layers:
        head = probe.head(layer, rows)
        y_BTD = exit_loss_node(hiddens[layer], head, CrossEntropy(labels_N), weight=weight, chunk_size=chunk_size)
        nothing(y_BTD).backward()


@contextmanager
def _frozen(probe: EarlyExitLM) -> Iterator[None]:
    """The backbone is the model's own: it learns nothing, and can learn again afterwards."""
    learnt = [parameter for parameter in probe.decoder.parameters() if parameter.requires_grad]
    for parameter in learnt:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learnt:
            parameter.requires_grad_(True)


def _ask(model: EarlyExitLM, rows: Rows, config: SuitConfig) -> ExitTable:
    device = model.decoder.embed.weight.device
    of_text = (batch.to(device) for batch in batches(rows, config.batch_size))
    return exit_table(model, of_text, policies=("max_prob",), chunk_size=config.chunk_size)


def _probed(name: str, table: ExitTable, costs: PartCosts, config: SuitConfig) -> Probed:
    final_N = table.exits[table.final].choice_N
    layers = tuple(layer for layer in table.exits if layer != table.final)
    choices = LayerChoices(
        layers=layers,
        num_layers=table.final,
        agrees_LN=np.stack([(table.exits[layer].choice_N == final_N).numpy() for layer in layers]),
        scores_LN=np.stack([table.exits[layer].scores["max_prob"].numpy() for layer in layers]),
    )
    advice = advise(choices, costs, precision=config.precision, is_tuned=name != "logit lens")
    return Probed(name=name, choices=choices, costs=costs, advice=advice)
