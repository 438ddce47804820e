"""What a server is told (TOML, options): the models by name, who may ask, and how much of anything is taken."""

import ipaddress
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from eellm.config.check import check_at_least, check_choice, check_fraction, check_literals
from eellm.config.infer import Method
from eellm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """`[[models]]`: one model, under the name that requests give."""

    path: str
    """A model directory, an adapter directory, a .gguf file or a hub id."""
    name: str
    """What requests call it."""
    adapter: Path | None = None
    """A directory with exits for this model. Adapters of one base directory share its weights."""

    def __post_init__(self) -> None:
        if not self.name or not self.name.isprintable():
            raise ConfigError(f"name = {self.name!r}: must be a printable word")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Serves models to OpenAI's clients over HTTP, by default to this machine alone."""

    model: str = ""
    """A model directory, an adapter directory, a .gguf file or a hub id. Several: `[[models]]` in a recipe."""
    adapter: Path | None = None
    """A directory with exits for this model."""
    name: str = ""
    """What requests call the model. Default: the directory's name."""
    models: tuple[ServedModel, ...] = ()
    """In a recipe, instead of `model`: several, by name."""
    host: str = "127.0.0.1"
    """The address to listen at."""
    port: int = 8000
    """0: any free one; the line on stdout says which."""
    api_keys: Path | None = None
    """A TOML file with lines `name = "key"`; then all but /health want one. The names are logged."""
    open_to_all: bool = False
    """Listen to other machines without any keys."""
    allowed_hosts: tuple[str, ...] = ()
    """Names that a request may call this server by, without port. Default: without keys, the loopback's; else any."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose web pages may ask (`https://example.org`, or `*`)."""
    max_batch: int = 16
    """Requests served at the same time."""
    max_waiting: int = 64
    """Requests that may wait; the next ones get 429."""
    max_tokens: int = 4096
    """Most tokens of one request, prompt and answer together."""
    max_body_bytes: int = 1_000_000
    """Largest request body."""
    max_stops: int = 16
    """Most stop strings of a request."""
    max_stop_chars: int = 1000
    """Longest stop string."""
    method: Method = "auto"
    """How tokens are made where a request doesn't say. `auto` is lossless."""
    quantize: Literal["int8", "int4"] | None = None
    """Weights of 8 or 4 bits (CPU only)."""
    compile: bool = True
    """Run kernels that the machine's C++ compiler builds once for its processor, where they can run the model; on CUDA,
    record passes as graphs."""
    workers: int = 1
    """Processes that share the layers."""
    shadow: float = 0.0
    """Share of the tokens that are held against the final exit after they left early, to see whether certificates hold;
    not with workers. 0.01 costs next to nothing."""
    recall: int = 32768
    """Tokens of finished texts that are remembered, for others' drafts: how fast an answer comes then depends on them,
    never what it says. 0: none."""
    tp: int = 1
    """So many of the workers share each matrix of a stage (tensor parallel); workers is a multiple of it."""
    dtype: str = "float32"
    """Of the computation: float32, bfloat16, float16 or float64."""
    device: str = "cpu"
    """Where to compute."""
    warm_up: bool = True
    """Measure, before the first request, what parts of the model cost here."""
    stream_s: float = 0.03
    """Tokens of a stream, but its first, are sent together where they are made within this time."""
    deadline_s: float = 600.0
    """A request that isn't over by then is ended."""
    body_s: float = 30.0
    """A client that hasn't sent its request by then is let go."""
    drain_s: float = 30.0
    """After SIGTERM, how long running requests may go on."""
    log_prompts: bool = False
    """Put prompts into the access log."""

    def __post_init__(self) -> None:
        check_literals(self)
        if self.quantize is not None:
            check_choice("quantize", self.quantize, ("int8", "int4"))
        check_at_least(self, 0, "recall", "port", "max_waiting", "max_stops", "stream_s", "drain_s")
        check_at_least(self, 1, "max_batch", "max_tokens", "max_body_bytes", "max_stop_chars", "workers", "tp")
        check_at_least(self, 1e-3, "deadline_s", "body_s")
        check_fraction(self, "shadow")
        if self.port > 65535:
            raise ConfigError(f"port = {self.port}: must be at most 65535")
        if self.models and (self.model or self.adapter or self.name):
            raise ConfigError("model: give one model (model, adapter, name) or a list of models, not both")
        if (self.adapter or self.name) and not self.model:
            raise ConfigError("model: name the model that the adapter or the name is for")
        twice = [name for name, count in Counter(served.name for served in self.models).items() if count > 1]
        if twice:
            raise ConfigError(f"models: two are called {twice[0]!r}")

    def served(self) -> tuple[ServedModel, ...]:
        """All models, each with its name. Raises ConfigError where there is none."""
        if self.models:
            return self.models
        if not self.model:
            raise ConfigError("name the model to serve: eellm serve MODEL, or [[models]] in a recipe")
        name = self.name or Path(self.model).resolve().name.removesuffix(".gguf")
        return (ServedModel(path=self.model, name=name, adapter=self.adapter),)

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def check_open(self) -> None:
        """Raises ConfigError where strangers could ask without anybody having said so."""
        if not self.is_local and self.api_keys is None and not self.open_to_all:
            raise ConfigError(
                f"host = {self.host!r}: others could ask without a key; give --api-keys FILE, or say --open-to-all"
            )
