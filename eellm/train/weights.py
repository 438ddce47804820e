"""What each early exit's loss weighs at a step: its schedule, and the curriculum that says who takes part.

A pure function of the step t (from 1, as in the metrics), so a resumed run needs no state for it. Without torch.
Sources: EE-LLM (arXiv 2312.04916) for warm-up and cool-down of the weights, LayerSkip (arXiv 2404.16710) for the
curricula. Its normalisation over the exits that take part is left out: a weight is what the recipe says.
"""

import math

from eellm.config.train import LossConfig
from eellm.errors import ConfigError

DEFAULT_WEIGHT = 0.3


def exit_weights(config: LossConfig, layers: tuple[int, ...], step: int, num_steps: int) -> dict[int, float]:
    """Weight of each early exit at `step` of `num_steps`, by layer. An exit with weight 0 takes no part in the step.

    layers: of the early exits, ascending. Call `check_weights` before the first step.
    """
    finals = config.exit_weights or (DEFAULT_WEIGHT,) * len(layers)
    starts = config.initial_weights or (0.0,) * len(layers)
    share = _share(config, step)
    taking_part = _taking_part(config, layers, step, num_steps)
    return {
        layer: (1 - share) * start + share * final if layer in taking_part else 0.0
        for layer, start, final in zip(layers, starts, finals, strict=True)
    }


def check_weights(config: LossConfig, layers: tuple[int, ...]) -> None:
    """Raises ConfigError where weights don't fit the exits at `layers`."""
    for name in ("exit_weights", "initial_weights"):
        weights = getattr(config, name)
        if weights and len(weights) != len(layers):
            where = f", after layers {', '.join(map(str, layers))}" if layers else ""
            raise ConfigError(
                f"objective.{name} = {list(weights)}: {len(weights)} of them, and the model has {len(layers)} early "
                f"exits{where}; give one each, or leave it out"
            )
        if not all(0 <= weight < math.inf for weight in weights):
            raise ConfigError(f"objective.{name} = {list(weights)}: must be finite and at least 0")


def _share(config: LossConfig, step: int) -> float:
    """How far the weights have come from the initial ones (0) to the final ones (1)."""
    if config.weight_schedule == "constant":
        return 1.0
    reached = min(1.0, step / config.weight_warmup_steps) if config.weight_warmup_steps else 1.0
    return reached if config.weight_schedule == "linear" else 0.5 * (1 - math.cos(math.pi * reached))


def _taking_part(config: LossConfig, layers: tuple[int, ...], step: int, num_steps: int) -> set[int]:
    if config.curriculum == "rotational":
        return {layer for layer in layers if (layer - 1 - step) % config.curriculum_period == 0}
    if config.curriculum == "gradual":
        # One more exit every num_steps / (2n) steps, from the top down: all n from half of the run on.
        num_enabled = min(len(layers), 2 * len(layers) * step // num_steps)
        return set(layers[len(layers) - num_enabled :])
    return set(layers)
