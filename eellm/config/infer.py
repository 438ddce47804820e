"""What a user asks of generation: sampling, the method, the exit rule. Plain numbers, no torch."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

from eellm.config.check import (
    check_at_least,
    check_choice,
    check_fraction,
    check_literals,
    check_numbers,
    check_switch,
    check_whole,
)
from eellm.errors import ConfigError, did_you_mean

Method = Literal["full", "early", "speculative", "pipelined", "auto"]
PolicyName = Literal["max_prob", "margin", "entropy", "gate"]
Metric = Literal["disagreement", "perplexity", "rouge_l"]
Threshold = float | Mapping[int, float]
POLICY: PolicyName = "max_prob"
"""Where none is named."""
EXIT_THRESHOLD = 0.8
DRAFT_THRESHOLD = 0.4


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn from the logits of the exit taken. The default is greedy."""

    temperature: float = 0.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: int = 0
    """Only the k most likely tokens; 0: all."""
    top_p: float = 1.0
    """Only the most likely tokens that together hold this probability."""
    min_p: float = 0.0
    """Only tokens with at least this share of the most likely one's probability."""
    repetition_penalty: float = 1.0
    """Above 1: logits of tokens seen before (prompt included) are divided by it, or multiplied where negative."""
    presence_penalty: float = 0.0
    """Taken off the logits of tokens that the answer has already; below 0 they become likelier."""
    frequency_penalty: float = 0.0
    """Taken off the logits of tokens that the answer has already, once for each time."""
    seed: int | None = None
    """Makes a request's draws repeatable, whatever runs beside it and whatever drafts. Every prompt of a call starts
    from this seed."""

    def __post_init__(self) -> None:
        check_at_least(self, 0, "temperature", "top_k", "seed")
        check_fraction(self, "top_p", "min_p")
        check_numbers(self, "repetition_penalty", "presence_penalty", "frequency_penalty")
        if not 0 < self.repetition_penalty < math.inf:
            raise ConfigError(f"repetition_penalty = {self.repetition_penalty!r}: must be above 0 and finite")
        if self.seed is not None and self.seed >= 2**64:
            raise ConfigError(f"seed = {self.seed}: must be below 2^64")
        for name in ("temperature", "presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(f"{name} = {getattr(self, name)!r}: must be finite")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """One request's options, apart from its prompt."""

    max_new_tokens: int = 64
    """Upper bound on the tokens generated."""
    method: Method = "early"
    """`full`: every token through every layer. `early`: each token leaves at the first exit that is sure enough.
    `speculative`: exits draft, the final exit judges; the tokens are those of `full`. `pipelined`: `early` over several
    workers. `auto`: the fastest as measured, among the lossless ones unless a threshold or a risk is given."""
    policy: PolicyName | None = None
    """The score in [0, 1] that says how sure an exit is. Unset: `max_prob`."""
    threshold: Threshold | None = None
    """An exit is taken at a score of at least this; 1 or more turns exits off. One number, or one per exit layer. Under
    `speculative` it is the score below which drafting stops. Unset: 0.8, and 0.4 for drafts."""
    exits: tuple[int, ...] | None = None
    """Layers of the exits in use; unset, all that the model has (or that `threshold` names)."""
    risk: float | None = None
    """In place of policy, threshold and exits: those of the model's certificate with the largest risk up to this one
    (`eellm calibrate` makes certificates)."""
    risk_metric: Metric = "disagreement"
    """What the risk is measured in."""
    max_deferred: int = 16
    """Most rows that may wait for their deeper layers before one pass through the full depth is forced."""
    max_draft: int = 8
    """Under `speculative`, most tokens that are drafted before they are judged; how many is chosen as it goes."""
    lookup: bool = True
    """Under `speculative`, draft what followed the same words earlier, in this text or a finished one, if any did."""
    always_draft: bool = False
    """Under `speculative`, draft in every round, also where plain decoding is faster by the measured costs."""
    typical: float = 0.0
    """Under `speculative`, above 0: a draft is also right if its final probability is at least this share of the
    likeliest one's. Faster, and no longer lossless."""
    top_logprobs: int = 0
    """With each token, so many of the likeliest ones with their log-probabilities."""
    sampling: Sampling = Sampling()
    """How tokens are drawn."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are cut off it."""
    ignore_eos: bool = False
    """Go on after an end-of-text token."""

    def __post_init__(self) -> None:
        check_literals(self)
        check_at_least(self, 0, "top_logprobs")
        check_at_least(self, 1, "max_new_tokens", "max_deferred", "max_draft")
        check_fraction(self, "typical")
        for name in ("lookup", "always_draft", "ignore_eos"):
            check_switch(name, getattr(self, name))
        for layer in self.exits or ():
            check_whole("exits", layer, 1)
        if not isinstance(self.sampling, Sampling):
            raise ConfigError(f"sampling = {self.sampling!r}: must be a Sampling, as Sampling(temperature=0.7) is")
        if self.policy is not None:
            check_choice("policy", self.policy, get_args(PolicyName))
        if self.risk is not None:
            self._check_risk()
        if self.threshold is not None:
            for value in self.threshold.values() if isinstance(self.threshold, Mapping) else (self.threshold,):
                _check_threshold(value)
        if isinstance(self.stop, str) or not all(isinstance(text, str) for text in self.stop):
            raise ConfigError(f"stop = {self.stop!r}: must be a tuple of strings")
        if "" in self.stop:
            raise ConfigError("stop = '': an empty stop string would end every text at once")

    def _check_risk(self) -> None:
        check_risk(self)
        for name in ("threshold", "policy", "exits"):
            if getattr(self, name) is not None:
                raise ConfigError(f"risk = {self.risk}: the certificate says which {name} to use; leave {name} out")
        if self.method in ("full", "speculative"):
            raise ConfigError(
                f"risk = {self.risk}: method = {self.method!r} loses nothing; a risk is for early, pipelined or auto"
            )

    @property
    def exits_answer(self) -> bool:
        """Whether what an exit says is the token; otherwise the final exit has the last word."""
        is_bound = self.threshold is not None or self.risk is not None
        return self.method in ("early", "pipelined") or (self.method == "auto" and is_bound)


def check_risk(config: Any) -> None:
    """Its field `risk` is the bound of a certificate."""
    check_numbers(config, "risk")
    if not 0 < config.risk < 1:
        raise ConfigError(f"risk = {config.risk!r}: must lie between 0 and 1, as 0.02 does")


def generate_config(*, exits: Iterable[int] | None = None, stop: Iterable[str] = (), **fields: Any) -> GenerateConfig:
    """Options by name, as people write them: lists for tuples, one stop string without a list. Raises ConfigError for
    what is none."""
    known = [field.name for field in dataclasses.fields(GenerateConfig)]
    for name in fields:
        if name not in known:
            raise ConfigError(f"{name!r} is no option of generation{did_you_mean(name, known)}")
    for name, value in (("exits", exits), ("stop", stop)):
        if not isinstance(value, Iterable | None):
            raise ConfigError(f"{name} = {value!r}: must be a list")
    return GenerateConfig(
        exits=None if exits is None else tuple(exits),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        **fields,
    )


def check_engine(
    max_batch: int,
    max_tokens: int,
    quantize: str | None,
    compile: bool | None,
    workers: int,
    tp: int,
    *,
    timeout_s: float,
    shadow: float,
) -> None:
    """Settings of an engine, before anything is started. Raises ConfigError."""
    for name, value in (("max_batch", max_batch), ("max_tokens", max_tokens), ("workers", workers), ("tp", tp)):
        check_whole(name, value, 1)
    if quantize is not None:
        check_choice("quantize", quantize, ("int8", "int4"))
    check_switch("compile", compile, may_be_unset=True)
    for name, value in (("timeout_s", timeout_s), ("shadow", shadow)):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise ConfigError(f"{name} = {value!r}: must be a number")
    if not 0 < timeout_s < math.inf:
        raise ConfigError(f"timeout_s = {timeout_s!r}: must be above 0 and finite")
    if not 0 <= shadow <= 1:
        raise ConfigError(f"shadow = {shadow!r}: must lie between 0 and 1, as 0.01 does")
    if workers > 1 and shadow > 0:
        raise ConfigError(f"shadow = {shadow}: tokens can't be checked across workers; leave one of the two out")


def _check_threshold(value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not float(value) >= 0:  # NaN fails the comparison
        raise ConfigError(f"threshold = {value!r}: must be a number of at least 0 (1 or more turns exits off)")


def thresholds_by_layer(options: GenerateConfig, exit_layers: tuple[int, ...]) -> dict[int, float]:
    """The exits that can be taken, each with its threshold; those at 1 or above are off and left out.

    Raises ConfigError for a layer that has no exit.
    """
    threshold = options.threshold
    if threshold is None:
        threshold = DRAFT_THRESHOLD if options.method in ("speculative", "auto") else EXIT_THRESHOLD
    named = options.exits
    if named is None:
        named = tuple(threshold) if isinstance(threshold, Mapping) else exit_layers
    for layer in named:
        if layer not in exit_layers:
            have = ", ".join(map(str, exit_layers)) or "none"
            raise ConfigError(f"exits: the model has no exit at layer {layer}; it has {have}")
    if isinstance(threshold, Mapping):
        missing = [layer for layer in named if layer not in threshold]
        if missing:
            raise ConfigError(f"threshold: none given for the exit at layer {missing[0]}")
        chosen = {layer: float(threshold[layer]) for layer in named}
    else:
        chosen = dict.fromkeys(named, float(threshold))
    return {layer: tau for layer, tau in sorted(chosen.items()) if tau < 1}
