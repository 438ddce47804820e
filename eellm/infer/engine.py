"""Generation: prompts in, tokens out, each with the exit that it left at.

    Request → decode.step(prompt) → Choice → Sampler.draw → Token → … → Generation

`stream` yields tokens as they come; `generate` collects them. One sequence at a time.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from eellm.config.infer import GenerateConfig, Sampling, Threshold
from eellm.errors import RequestError
from eellm.exits.lm import EarlyExitLM
from eellm.infer.decode.base import Decode
from eellm.infer.decode.early import Early
from eellm.infer.decode.full import Full
from eellm.infer.layout import lay_out_for_decoding
from eellm.infer.request import Prompt, Request, make_request
from eellm.infer.sampling import Sampler
from eellm.text.stream import StopStrings, StreamDecoder


@dataclass(frozen=True, kw_only=True)
class Token:
    """One new token."""

    id: int
    text: str
    """What became certain of the text with this token; pieces joined are the whole text. Empty without tokenizer."""
    exit: int
    """The layer whose exit it was drawn from; L for the final one."""
    confidence: float
    """The policy's score of that exit's logits (under `gate`: the gate's, and 1 at the final exit)."""
    logprob: float
    """Log-probability under the raw logits of that exit."""


@dataclass(frozen=True, kw_only=True)
class Stats:
    """What a generation cost."""

    prompt_tokens: int
    new_tokens: int
    prefill_s: float
    """Time to the first new token."""
    decode_s: float
    """Time from the first to the last new token."""
    tokens_per_s: float
    """New tokens after the first over `decode_s`; of a single token, 1 / prefill_s."""
    mean_exit_layer: float
    layers_run: int
    """Passes through a layer, of any number of rows: what decoding pays for where reading weights is the bound."""
    layers_full: int
    """What full depth would have run: L for each new token."""
    deep_passes: int
    """Passes that reached the last layer."""
    heads_run: dict[int, int]
    """Output matrix runs by exit layer."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One prompt's continuation. The lists have one value per new token; a final end-of-text token is among them."""

    text: str | None
    """Without special tokens, cut at the stop string; None for models without tokenizer."""
    tokens: list[int]
    exits: list[int]
    confidences: list[float]
    logprobs: list[float]
    pieces: list[str]
    """The text that became certain with each token."""
    finish_reason: str
    """`eos`, `stop` (a stop string) or `length` (max_new_tokens or the model's context)."""
    stats: Stats


def generate(
    model: EarlyExitLM,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 64,
    method: Any = "early",
    policy: Any = "max_prob",
    threshold: Threshold = 0.8,
    exits: Sequence[int] | None = None,
    max_deferred: int = 16,
    sampling: Sampling = Sampling(),
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
) -> list[Generation]:
    """Continues each prompt; what comes out for one doesn't depend on the others.

    prompts: strings, lists of token ids, or lists of chat messages ({"role": …, "content": …}). The other options are
    those of `GenerateConfig`. Raises ConfigError or RequestError before anything is generated.
    """
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int | Mapping)):
        raise RequestError("prompts must be a list of prompts; put the single one in a list")
    options = GenerateConfig(
        max_new_tokens=max_new_tokens,
        method=method,
        policy=policy,
        threshold=threshold,
        exits=None if exits is None else tuple(exits),
        max_deferred=max_deferred,
        sampling=sampling,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        ignore_eos=ignore_eos,
    )
    requests = [make_request(model, prompt, options) for prompt in prompts]
    return [_collect(Run(model, request)) for request in requests]


def stream(model: EarlyExitLM, prompt: Prompt, options: GenerateConfig = GenerateConfig()) -> "Run":
    """An iterator over the new tokens of one prompt; after it ended, `finish_reason` and `stats()` are there."""
    return Run(model, make_request(model, prompt, options))


class Run(Iterator[Token]):
    """One request being generated. Iterating it does the work, once."""

    def __init__(self, model: EarlyExitLM, request: Request) -> None:
        self.model = model
        self.request = request
        lay_out_for_decoding(model)
        self.decode = _decode(model, request)
        self.sampler = Sampler(request.options.sampling, request.tokens, model.decoder.embed.weight.device)
        self.finish_reason = "length"
        self.exits: list[int] = []
        self._times: list[float] = []
        self._tokens = self._generate()
        self._decoder = StreamDecoder(model.tokenizer) if model.tokenizer is not None else None
        self._stops = StopStrings(request.options.stop)

    def __next__(self) -> Token:
        return next(self._tokens)

    def _generate(self) -> Iterator[Token]:
        request, options = self.request, self.request.options
        self._times = [time.perf_counter()]
        tokens = request.tokens
        room = request.capacity(self.model.config.max_seq_len) - len(tokens)
        for number in range(1, room + 1):
            with torch.inference_mode():
                choice = self.decode.step(tokens)
                token = self.sampler.draw(choice.logits_V)
                logprob = float(choice.logits_V[token] - choice.logits_V.logsumexp(-1))
            tokens = [token]
            ended = token in self.model.config.eos_token_ids and not options.ignore_eos
            text, stopped = self._text_of(token, last=ended or number == room)
            self._times.append(time.perf_counter())
            self.exits.append(choice.layer)
            if ended or stopped:
                self.finish_reason = "stop" if stopped else "eos"
            yield Token(id=token, text=text, exit=choice.layer, confidence=choice.score, logprob=logprob)
            if ended or stopped:
                return

    def _text_of(self, token: int, *, last: bool) -> tuple[str, bool]:
        """The text that is certain now, and whether a stop string ended it."""
        if self._decoder is None:
            return "", False
        text = self._decoder.push(token)
        if last:
            text += self._decoder.finish()
        text = self._stops.push(text)
        if last:
            text += self._stops.finish()
        return text, self._stops.stopped

    def stats(self) -> Stats:
        """What the run cost so far."""
        num, work = len(self.exits), self.decode.work
        assert num, "iterate the run first"
        prefill_s, decode_s = self._times[1] - self._times[0], self._times[-1] - self._times[1]
        return Stats(
            prompt_tokens=len(self.request.tokens),
            new_tokens=num,
            prefill_s=prefill_s,
            decode_s=decode_s,
            tokens_per_s=(num - 1) / decode_s if num > 1 else 1 / prefill_s,
            mean_exit_layer=sum(self.exits) / num,
            layers_run=work.layers,
            layers_full=self.model.config.num_layers * num,
            deep_passes=work.deep_passes,
            heads_run=dict(sorted(work.heads.items())),
        )


def _decode(model: EarlyExitLM, request: Request) -> Decode:
    options = request.options
    capacity = request.capacity(model.config.max_seq_len)
    if options.method == "full":
        return Full(model, policy=options.policy, capacity=capacity)
    return Early(
        model,
        request.thresholds,
        policy=options.policy,
        max_deferred=options.max_deferred,
        capacity=capacity,
    )


def _collect(run: Run) -> Generation:
    tokens = list(run)
    return Generation(
        text="".join(t.text for t in tokens) if run.model.tokenizer is not None else None,
        tokens=[t.id for t in tokens],
        exits=[t.exit for t in tokens],
        confidences=[t.confidence for t in tokens],
        logprobs=[t.logprob for t in tokens],
        pieces=[t.text for t in tokens],
        finish_reason=run.finish_reason,
        stats=run.stats(),
    )
