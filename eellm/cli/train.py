"""`eellm train RECIPE.toml [--parallel.tp 2 …]`, in one process or in each of those that torchrun starts."""

from pathlib import Path

from eellm.cli.options import parse
from eellm.config.load import from_toml, read_toml, to_dict
from eellm.config.train import TrainConfig
from eellm.errors import ConfigError

USAGE = "name the recipe first: eellm train RECIPE.toml [--parallel.tp 2 …]"


def main(args: list[str]) -> None:
    if not args or args[0].startswith("-"):
        if "--help" in args or "-h" in args:
            parse(TrainConfig, ["--help"], verb="train RECIPE.toml")
        raise ConfigError(USAGE)
    if any(word.startswith("--model.exits") for word in args):
        raise ConfigError("--model.exits: exits are a list of tables; write them in the recipe")
    config = parse(TrainConfig, args[1:], verb="train", default=_read(Path(args[0]), args[1:]))
    from eellm.parallel.mesh import is_launched, join, leave  # here: help and mistakes cost no torch import
    from eellm.train.loop import train
    from eellm.train.signals import end_with_parent

    if is_launched():
        end_with_parent()
    world = join(config.parallel, device=config.train.device)
    try:
        train(config, world)
    finally:
        leave()


def _read(recipe: Path, args: list[str]) -> TrainConfig:
    """The recipe; one without a model has that of `--init-from`."""
    start = _option(args, "--init-from")
    if start is None or "model" in read_toml(recipe):
        return from_toml(TrainConfig, recipe)
    from eellm.checkpoint.parts import read_model_config

    return from_toml(TrainConfig, recipe, {"model": to_dict(read_model_config(Path(start)))})


def _option(args: list[str], name: str) -> str | None:
    """The value of `--name value` or `--name=value`."""
    for i, word in enumerate(args):
        flag, _, value = word.replace("_", "-", word.split("=")[0].count("_")).partition("=")
        if flag == name:
            return value or (args[i + 1] if i + 1 < len(args) else None)
    return None
