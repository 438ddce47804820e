"""From a request's fields to what an engine is given: token ids and options, one prompt at a time.

Everything here runs off the event loop: it encodes text, and runs the model's own chat template on the messages.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from eellm.config.infer import GenerateConfig, Method, Sampling
from eellm.config.serve import ServeConfig
from eellm.exits.lm import EarlyExitLM
from eellm.infer.request import prompt_tokens
from eellm.serve.refusals import Refusal
from eellm.serve.schema import Asked, ChatRequest, CompletionRequest


@dataclass(frozen=True, kw_only=True)
class Prompt:
    tokens: list[int]
    text: str | None
    """As the client sent it; None: it sent ids, or messages."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request, ready for its engine."""

    body: CompletionRequest | ChatRequest
    prompts: list[Prompt]
    runs: list[tuple[int, GenerateConfig]]
    """One per answer, in the order of their indices: its prompt's index, and its options."""
    wants_logprobs: bool
    top_logprobs: int
    score_fields: Mapping[str, Any] | None
    """For `Engine.score` of the prompts; None: they needn't be scored."""

    @property
    def report(self) -> bool:
        return self.body.early_exit.report

    @property
    def wants_usage(self) -> bool:
        """At the end of a stream."""
        return self.body.stream_options is not None and self.body.stream_options.include_usage

    @property
    def echo(self) -> bool:
        return isinstance(self.body, CompletionRequest) and self.body.echo

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(prompt.tokens) for prompt in self.prompts)


def make_ask(
    model: EarlyExitLM, body: CompletionRequest | ChatRequest, config: ServeConfig, max_tokens: int, capacity: int
) -> Ask:
    """max_tokens: the engine's, for prompt and answer. capacity: most answers at a time. Raises Refusal and
    EellmError."""
    stops = _stops(body, config)
    prompts = _prompts(model, body, capacity)
    wants_logprobs, top_logprobs = _logprobs(body)
    base = _options(body, config, stops, top_logprobs)
    runs = []
    for i, prompt in enumerate(prompts):
        wanted = _max_new_tokens(body, max_tokens - len(prompt.tokens))
        if wanted == 0:
            continue
        options = replace(base, max_new_tokens=wanted)
        for j in range(body.n):
            runs.append((i, options if j == 0 or body.seed is None else _reseeded(options, body.seed + j)))
    ask = Ask(
        body=body,
        prompts=prompts,
        runs=runs,
        wants_logprobs=wants_logprobs,
        top_logprobs=top_logprobs,
        score_fields=None,
    )
    return replace(ask, score_fields=_score_fields(base, top_logprobs)) if ask.echo and wants_logprobs else ask


def _prompts(model: EarlyExitLM, body: CompletionRequest | ChatRequest, capacity: int) -> list[Prompt]:
    if isinstance(body, ChatRequest):
        return [Prompt(tokens=prompt_tokens(model, [message.plain() for message in body.messages]), text=None)]
    single = isinstance(body.prompt, str) or (bool(body.prompt) and isinstance(body.prompt[0], int))
    given: list[Any] = [body.prompt] if single else list(body.prompt)
    if not given:
        raise Refusal(400, "prompt: the list is empty", param="prompt")
    if len(given) * body.n > capacity:
        raise Refusal(400, f"{len(given) * body.n} answers in one request: at most {capacity} are made here")
    return [Prompt(tokens=prompt_tokens(model, one), text=one if isinstance(one, str) else None) for one in given]


def _stops(body: Asked, config: ServeConfig) -> tuple[str, ...]:
    stops = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    if len(stops) > config.max_stops:
        raise Refusal(400, f"stop: {len(stops)} strings; at most {config.max_stops} are taken here", param="stop")
    longest = max(map(len, stops), default=0)
    if longest > config.max_stop_chars:
        message = f"stop: a string of {longest} characters; at most {config.max_stop_chars} are taken here"
        raise Refusal(400, message, param="stop")
    return stops


def _logprobs(body: CompletionRequest | ChatRequest) -> tuple[bool, int]:
    """Whether entries are wanted, and with how many alternatives."""
    report = body.early_exit.report
    if isinstance(body, CompletionRequest):
        return report or body.logprobs is not None, body.logprobs or 0
    return report or body.logprobs, body.top_logprobs or 0


def _max_new_tokens(body: CompletionRequest | ChatRequest, room: int) -> int:
    wanted = body.max_tokens
    if isinstance(body, ChatRequest) and wanted is None:
        wanted = body.max_completion_tokens
    return max(1, room) if wanted is None else wanted


def _options(body: Asked, config: ServeConfig, stops: tuple[str, ...], top_logprobs: int) -> GenerateConfig:
    exit = body.early_exit
    given = {name: getattr(exit, name) for name in ("policy", "risk", "risk_metric", "max_deferred")}
    chosen = {name: value for name, value in given.items() if value is not None}
    if exit.exits is not None:
        chosen["exits"] = tuple(exit.exits)
    if exit.threshold is not None:
        chosen["threshold"] = _thresholds(exit.threshold)
    return GenerateConfig(
        method=_method(body, config),
        sampling=_sampling(body),
        stop=stops,
        ignore_eos=body.ignore_eos,
        top_logprobs=top_logprobs,
        **chosen,
    )


def _method(body: Asked, config: ServeConfig) -> Method:
    exit = body.early_exit
    if exit.method is not None:
        return exit.method
    return "early" if exit.is_lossy else config.method


def _sampling(body: Asked) -> Sampling:
    names = [option.name for option in fields(Sampling)]
    given = {name: getattr(body, name) for name in names}
    return Sampling(**given | {"seed": None if body.seed is None else body.seed % 2**64})


def _reseeded(options: GenerateConfig, seed: int) -> GenerateConfig:
    return replace(options, sampling=replace(options.sampling, seed=seed % 2**64))


def _thresholds(threshold: float | dict[str, float]) -> float | dict[int, float]:
    if not isinstance(threshold, dict):
        return threshold
    for layer in threshold:
        if not (layer.isascii() and layer.isdigit() and len(layer) < 10):
            message = f'early_exit.threshold: {layer!r} is no layer; write them as "10"'
            raise Refusal(400, message, param="early_exit.threshold")
    return {int(layer): value for layer, value in threshold.items()}


def _score_fields(options: GenerateConfig, top_logprobs: int) -> dict[str, Any]:
    """A prompt is scored where its tokens would have left: lossless methods leave at the end."""
    rule = ("policy", "threshold", "exits", "risk", "risk_metric")
    chosen = {name: getattr(options, name) for name in rule} if options.exits_answer else {}
    return chosen | {"top_logprobs": top_logprobs}
