"""Calibration: from a file of units to thresholds with a certificate.

    units ─┬─ a share → how sure and how wrong each exit is → path of thresholds, safe to risky
           └─ the others → their losses at each step → tested in order → the last step that passes → Certificate

The path is chosen by units that aren't tested, so what is tested was fixed before: that is what the certificate's
confidence needs (`eellm.evaluate.risk`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eellm.config.calibrate import CalibrateConfig, Certificate
from eellm.config.infer import GenerateConfig
from eellm.data.units import Units, documents_of
from eellm.errors import ConfigError, DataError
from eellm.evaluate.losses import AnswerLosses, Losses, read_losses
from eellm.evaluate.path import OFF, threshold_path
from eellm.evaluate.risk import last_safe_step, units_needed
from eellm.exits.certified import dtype_of, weights_sha256
from eellm.exits.lm import EarlyExitLM
from eellm.infer.request import make_request
from eellm.log import log


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Thresholds, and what was found of them: see `Certificate`."""

    thresholds: dict[int, float]
    num_units: int
    measured_risk: float
    p_value: float
    mean_exit_layer: float


def calibrate(
    model: EarlyExitLM, units: Units, config: CalibrateConfig, *, cache_dir: Path | None = None
) -> Certificate:
    """The certificate of the riskiest thresholds that can be shown to keep the risk.

    Raises DataError where the units are too few or none of the thresholds can be shown to, ConfigError for an exit or
    policy that the model doesn't have.
    """
    check_calibration(model, units, config)
    losses = _losses(model, units, config, cache_dir)
    _check_enough(losses.num_units, config)
    chosen = choose_thresholds(losses, config)
    is_answered = config.metric == "rouge_l"
    has_references = is_answered and units.units[0].reference is not None
    return Certificate(
        metric=config.metric,
        risk=config.risk,
        confidence=config.confidence,
        policy=config.policy,
        thresholds=tuple(chosen.thresholds.items()),
        num_units=chosen.num_units,
        measured_risk=chosen.measured_risk,
        p_value=chosen.p_value,
        mean_exit_layer=chosen.mean_exit_layer,
        clip=config.clip if config.metric == "perplexity" else None,
        against="reference" if has_references else "full",
        max_new_tokens=config.max_new_tokens if is_answered else None,
        data_sha256=units.sha256,
        weights_sha256=weights_sha256(model, chosen.thresholds),
        dtype=dtype_of(model),
    )


def check_calibration(model: EarlyExitLM, units: Units, config: CalibrateConfig) -> None:
    """Raises what can be known before any work."""
    if not model.config.exits:
        raise ConfigError("the model has no exits to find thresholds for; 'eellm tune' makes some")
    if model.tokenizer is None:
        raise DataError("the model has no tokenizer, which turns text into tokens; add its tokenizer.json")
    make_request(model, [0], GenerateConfig(policy=config.policy, exits=config.exits))
    _check_enough(len(units.units), config)


def num_on_path(num_units: int, config: CalibrateConfig) -> int:
    """Units that choose the path."""
    return max(1, round(config.path_share * num_units))


def choose_thresholds(losses: Losses, config: CalibrateConfig) -> Chosen:
    """The riskiest thresholds of the path up to which all pass. Raises DataError where none does."""
    order = np.random.default_rng(config.seed).permutation(losses.num_units)
    on_path, tested = np.split(order, [num_on_path(losses.num_units, config)])
    path = threshold_path(*losses.evidence(on_path), config.num_levels)
    mean_losses, mean_layers = [], []

    def losses_by_step() -> Iterator[list[float]]:
        for number, step in enumerate(path, start=1):
            found, mean_layer = losses.of(step, tested)
            mean_losses.append(float(np.mean(found)))
            mean_layers.append(mean_layer)
            log.debug(f"step {number} of {len(path)}: {step} loses {mean_losses[-1]:.4f}")
            yield found

    safe = last_safe_step(losses_by_step(), config.risk, config.confidence)
    if safe is None or all(tau >= OFF for tau in path[safe.index].values()):
        raise DataError(
            f"no thresholds can be shown to keep {config.metric} below {config.risk:g}: the safest that were tested "
            f"lose {mean_losses[-1]:.4f} on {len(tested)} units; give more units, or allow a larger risk"
        )
    return Chosen(
        thresholds=path[safe.index],
        num_units=len(tested),
        measured_risk=safe.mean_loss,
        p_value=safe.p_value,
        mean_exit_layer=mean_layers[safe.index],
    )


def _losses(model: EarlyExitLM, units: Units, config: CalibrateConfig, cache_dir: Path | None) -> Losses:
    if config.metric == "rouge_l":
        return AnswerLosses(model, units.units, config, cache_dir=cache_dir)
    assert model.tokenizer is not None, "it was checked"
    documents = documents_of(units, model.tokenizer)
    _check_enough(len(documents), config)
    return read_losses(model, documents, config)


def _check_enough(num_units: int, config: CalibrateConfig) -> None:
    """Raises DataError with the number that is needed."""
    needed = units_needed(config.risk, config.confidence)
    if num_units - num_on_path(num_units, config) >= needed:
        return
    total = needed + 1
    while total - num_on_path(total, config) < needed:
        total += 1
    raise DataError(
        f"{num_units} units: a risk of {config.risk:g} at a confidence of {config.confidence:g} needs {total} at the "
        f"least ({needed} to be tested, the others to choose the path); give more, shorter ones, or allow a larger risk"
    )
