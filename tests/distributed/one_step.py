"""One training step under a layout of processes against plain autograd on the whole model, in fp64.

    outcomes = run_on_ranks(2, run_steps, steps)             # per rank: one outcome per step
    differences(step, [rank[0] for rank in outcomes])        # [] where all is equal

The reference knows no stages, no loss nodes and no schedules: it is a sum of cross entropies and one `backward`. Rows
hold several documents, and some have no target. A `mistake` breaks the layout's side on purpose.
"""

import zlib
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

import eellm
from eellm.config.parallel import ParallelConfig
from eellm.config.train import LossConfig
from eellm.data.loader import Batch
from eellm.exits.loss import IGNORE
from eellm.parallel.gradients import settle_placements, square_sum, sum_tied
from eellm.parallel.mesh import AXES, World, join
from eellm.pipeline.placed import PlacedModel, place
from eellm.pipeline.run import Driver, Loop, Pipeline
from eellm.pipeline.stage import StepLosses
from eellm.pipeline.watched import unwatched
from tests.models import tiny_config

NUM_ROWS, SEQ_LEN, VOCAB = 8, 12, 32
TOLERANCE = 1e-10
SIZES = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_layers": 8, "max_seq_len": SEQ_LEN}


@dataclass(frozen=True)
class Step:
    """What is computed, and how it is laid out."""

    model: eellm.ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    is_dropped: bool = False
    """Whether sequences skip layers."""
    mistake: str | None = None

    def __str__(self) -> str:
        defaults = ParallelConfig()
        layout = {k: v for k, v in vars(self.parallel).items() if v != getattr(defaults, k)}
        exits = [f"{e.layer} {e.kind} {e.head} {e.norm}" for e in self.model.exits]
        return f"{layout}, exits {exits}, tie_embeddings {self.model.tie_embeddings}, mistake {self.mistake}"


@dataclass(frozen=True)
class Outcome:
    """What one process has after the step."""

    sums: dict[int, float]
    """Of the losses of each exit in training; over all processes they add up to the whole."""
    evaluated: dict[int, float]
    """The same, without gradients and without dropped layers."""
    norm: float
    errors: dict[str, float]
    """Largest difference to the reference, by the name of each parameter that has a gradient here."""


def step_of(exits=(), *, tie_embeddings=False, is_dropped=False, mistake=None, model=None, **parallel) -> Step:
    config = tiny_config(**SIZES | {"exits": tuple(exits), "tie_embeddings": tie_embeddings} | (model or {}))
    return Step(config, ParallelConfig(**parallel), is_dropped, mistake)


def value(name: str, shape: torch.Size) -> torch.Tensor:
    """What the parameter `name` holds: random, norms and biases too."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    drawn = 0.2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return drawn + 1 if len(shape) == 1 and not name.endswith("bias") else drawn


@cache
def batch(num_rows: int = NUM_ROWS) -> tuple[Batch, torch.Tensor]:
    """The global batch of packed rows, and which row keeps which layer."""
    generator = torch.Generator().manual_seed(5)
    shape, places_T = (num_rows, SEQ_LEN), torch.arange(SEQ_LEN)
    labels_BT = torch.randint(VOCAB, shape, generator=generator)
    labels_BT[torch.rand(shape, generator=generator) < 0.2] = IGNORE
    cuts_B1 = torch.randint(2, SEQ_LEN, (num_rows, 1), generator=generator)
    documents_BT = (places_T >= cuts_B1).long()
    rows = Batch(
        tokens_BT=torch.randint(VOCAB, shape, generator=generator),
        labels_BT=labels_BT,
        positions_BT=places_T - documents_BT * cuts_B1,
        documents_BT=documents_BT,
        is_packed=True,
    )
    return rows, torch.rand(num_rows, SIZES["num_layers"], generator=generator) > 0.3


def weights_of(model: eellm.ModelConfig) -> dict[int, float]:
    """Of each exit's mean loss, all different."""
    return {layer: 0.2 + 0.1 * layer for layer in model.exit_layers} | {model.num_layers: 1.0}


@torch.no_grad()
def whole_model(config: eellm.ModelConfig) -> eellm.EarlyExitLM:
    """The model in one piece."""
    model = eellm.build(config, dtype="float64")
    for name, parameter in model.named_parameters():
        parameter.copy_(value(name, parameter.shape))
    return model


@cache
def reference(config: eellm.ModelConfig, is_dropped: bool):
    """Gradients by name, sums of the losses, and sums without dropped layers."""
    model = whole_model(config)
    with torch.no_grad():
        evaluated = _losses(model, is_dropped=False)
    sums = _losses(model, is_dropped=is_dropped)
    num_targets = (batch()[0].labels_BT != IGNORE).sum()
    sum(weight * sums[layer] / num_targets for layer, weight in weights_of(config).items()).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return grads, {n: x.item() for n, x in sums.items()}, {n: x.item() for n, x in evaluated.items()}


def _losses(model: eellm.EarlyExitLM, *, is_dropped: bool) -> dict[int, torch.Tensor]:
    rows, keep_BL = batch()
    packed = model.decoder.packed_rows(rows.positions_BT, rows.documents_BT, torch.float64)
    h_BTD, sums = model.decoder.embed(rows.tokens_BT), {}
    for n in range(1, model.config.num_layers + 1):
        y_BTD = model.decoder.layer(n)(h_BTD, packed)
        h_BTD = torch.where(keep_BL[:, n - 1, None, None], y_BTD, h_BTD) if is_dropped else y_BTD
        if n in (*model.config.exit_layers, model.config.num_layers):
            logits_NV = model.logits(n, model.normed(n, h_BTD, packed)).flatten(0, 1)
            sums[n] = F.cross_entropy(logits_NV, rows.labels_BT.flatten(), ignore_index=IGNORE, reduction="sum")
    return sums


def run_steps(steps: list[Step]) -> list[Outcome]:
    """On each rank: all steps, one after the other, on as few meshes as they have."""
    worlds: dict[tuple[int, ...], World] = {}
    outcomes = []
    for step in steps:
        shape = tuple(getattr(step.parallel, axis) for axis in AXES)
        if shape not in worlds:
            worlds[shape] = join(step.parallel)
        try:
            outcomes.append(run_step(step, worlds[shape]))
        except Exception as error:
            raise RuntimeError(f"in {step}") from error
    return outcomes


def run_step(step: Step, world: World) -> Outcome:
    placed = place(step.model, step.parallel, world, objective=LossConfig(chunk_size=5), dtype="float64")
    placed.fill(value)
    driver, (rows, keep_BL) = _driver(step, placed, world), batch()
    mine = NUM_ROWS // step.parallel.dp
    part = slice(world.dp_index * mine, (world.dp_index + 1) * mine)
    evaluation = StepLosses(dict.fromkeys(weights_of(step.model), 1.0))
    driver.evaluate(rows.part(part), evaluation)
    num_targets = int((rows.labels_BT != IGNORE).sum())
    weights = {layer: weight / num_targets for layer, weight in weights_of(step.model).items()}
    if step.mistake == "an exit's weight is off by 1%":
        weights[step.model.exit_layers[0]] *= 1.01
    losses = StepLosses(weights)
    driver.step(rows.part(part), losses, keep_BL[part] if step.is_dropped else None)
    if step.mistake != "gradients keep their pending sums":
        settle_placements(placed.trainable())
    if step.mistake != "tied gradients aren't summed":
        sum_tied(placed.tied)
    counted = placed.trainable() if step.mistake == "tied copies count twice" else placed.counted
    norm = float(world.sum(square_sum(counted, world)).sqrt())
    sums, evaluated = (
        {n: float(x) / step.parallel.tp for n, x in each.sums().items()} for each in (losses, evaluation)
    )
    return Outcome(sums, evaluated, norm, _errors(step, placed))


def _driver(step: Step, placed: PlacedModel, world: World) -> Driver:
    parallel = step.parallel
    if parallel.pp == 1:
        return Loop(placed.modules[0], parallel, unwatched)
    return Pipeline(
        placed.modules,
        parallel,
        unwatched,
        group=world.submesh("pp").get_group(),
        microbatch=(NUM_ROWS // parallel.dp // parallel.num_microbatches, SEQ_LEN),
        hidden=(step.model.hidden_size, torch.float64),
        device=world.device,
    )


def _errors(step: Step, placed: PlacedModel) -> dict[str, float]:
    expected, _, _ = reference(step.model, step.is_dropped)
    errors: dict[str, float] = {}
    for name, copies in placed.parameters.items():
        for copy in copies:
            if copy.grad is not None:
                error = (stepped_gradient(copy) - expected[name]).abs().max().item()
                errors[name] = max(errors.get(name, 0.0), error)
    return errors


def stepped_gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The gradient that an optimizer would step with, whole: what each process holds, where its parameter is."""
    if not isinstance(parameter, DTensor):
        return parameter.grad
    mine, mesh = parameter.grad.to_local(), parameter.device_mesh
    shape, stride = parameter.shape, parameter.stride()
    grad = DTensor.from_local(mine, mesh, parameter.placements, run_check=False, shape=shape, stride=stride)
    return grad.full_tensor()


def differences(step: Step, outcomes: list[Outcome]) -> list[str]:
    """What isn't equal to one process, by name; nothing is left out."""
    grads, sums, evaluated = reference(step.model, step.is_dropped)
    norm = float(torch.stack([grad.square().sum() for grad in grads.values()]).sum().sqrt())
    found = [f"no gradient of {name}" for name in grads if not any(name in outcome.errors for outcome in outcomes)]
    for rank, outcome in enumerate(outcomes):
        found += [f"gradient of {name} on rank {rank}" for name, e in outcome.errors.items() if not e <= TOLERANCE]
        if not abs(outcome.norm - norm) <= TOLERANCE:
            found.append(f"norm on rank {rank}")
    for what, expected in (("sums", sums), ("evaluated", evaluated)):
        for layer, total in expected.items():
            whole = sum(getattr(outcome, what).get(layer, 0.0) for outcome in outcomes)
            if not abs(whole - total) <= TOLERANCE:
                found.append(f"{what} of exit {layer}")
    return found
