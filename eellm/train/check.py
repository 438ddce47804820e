"""What a recipe's parts must agree on, looked at before anything starts; errors name the nearest values that work."""

from eellm.config.train import TrainConfig
from eellm.errors import ConfigError
from eellm.plan.layout import fit_layout
from eellm.train.weights import check_weights


def resolve(config: TrainConfig) -> TrainConfig:
    """The recipe with `num_microbatches` filled in. Raises ConfigError where its parts don't fit."""
    model = config.model
    check_weights(config.objective, model.exit_layers)
    if config.data.seq_len > model.max_seq_len:
        raise ConfigError(f"data.seq_len = {config.data.seq_len}: the model's context is {model.max_seq_len}")
    return fit_layout(config)
