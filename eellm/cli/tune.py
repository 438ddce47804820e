"""`eellm tune RECIPE.toml [--optim.lr 1e-3 …]`, in one process or in each of those that torchrun starts."""

from pathlib import Path

from eellm.cli.options import parse
from eellm.config.load import from_toml
from eellm.config.tune import TuneConfig
from eellm.errors import ConfigError


def main(args: list[str]) -> None:
    if not args or args[0].startswith("-"):
        if "--help" in args or "-h" in args:
            parse(TuneConfig, ["--help"], verb="tune RECIPE.toml")
        raise ConfigError("name the recipe first: eellm tune RECIPE.toml [--optim.lr 1e-3 …]")
    if any(word.startswith("--model.exits") for word in args):
        raise ConfigError("--model.exits: exits are a list of tables; write them in the recipe")
    recipe = from_toml(TuneConfig, Path(args[0]))
    config = parse(TuneConfig, args[1:], verb="tune", default=recipe)
    from eellm.parallel.mesh import is_launched, leave  # here: help and mistakes cost no torch import
    from eellm.train.signals import end_with_parent
    from eellm.train.tune import tune

    if is_launched():
        end_with_parent()
    try:
        tune(config)
    finally:
        leave()
