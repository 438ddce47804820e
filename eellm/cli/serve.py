"""`eellm serve MODEL [--port 8000 …]`, or `eellm serve RECIPE.toml [--port 8000 …]`."""

from importlib.util import find_spec
from pathlib import Path

from eellm.cli.options import CACHE_DIR, parse
from eellm.config.load import from_toml
from eellm.config.serve import ServeConfig
from eellm.errors import ConfigError

NEEDS = ("fastapi", "uvicorn", "httptools", "pydantic", "prometheus_client")


def main(args: list[str]) -> None:
    config = read(args)
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        raise ConfigError(f"{missing[0]} is not installed: pip install 'eellm[serve]'")
    config.served()
    config.check_open()
    from eellm.serve.run import serve  # here: help and mistakes cost no torch import

    def announce(url: str) -> None:
        print(f"serving {', '.join(model.name for model in config.served())} at {url}", flush=True)

    if serve(config, cache_dir=CACHE_DIR, announce=announce):
        raise KeyboardInterrupt


def read(args: list[str]) -> ServeConfig:
    """The recipe or the model that comes first, under the options that follow."""
    if any(word.startswith("--models") for word in args):
        raise ConfigError("--models: models are a list of tables; write them in the recipe")
    if not args or args[0].startswith("-"):
        return parse(ServeConfig, args, verb="serve [MODEL | RECIPE.toml]")
    is_recipe = args[0].endswith(".toml")
    default = from_toml(ServeConfig, Path(args[0])) if is_recipe else ServeConfig(model=args[0])
    return parse(ServeConfig, args[1:], verb="serve [MODEL | RECIPE.toml]", default=default)
