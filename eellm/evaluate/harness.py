"""A model of ours as lm-eval knows models: the type `eellm`, on an engine.

    (context, continuation) → ids, the beginning cut where they are too many → Engine.score
    text → windows of the model's context, each token in one of them → Engine.score
    (context, stop strings, …) → Engine.submit, many at a time

`python -m eellm.evaluate.harness` is lm-eval's own command line with this type in it. It comes with the extra `eval`.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from eellm.checkpoint.hf import load
from eellm.config.infer import Sampling
from eellm.errors import ConfigError, RequestError, did_you_mean
from eellm.evaluate.rule import ExitRule
from eellm.exits.lm import EarlyExitLM
from eellm.infer.engine import Engine
from eellm.infer.quantize import Quantize
from eellm.infer.request import split_pair
from eellm.log import log

Pair = tuple[list[int], list[int]]
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
OPTIONS = ("until", "max_gen_toks", "do_sample", *SAMPLING)
TEXTS = 64
"""That are scored at a time; those of like length together."""


@dataclass
class Counts:
    """What the answers took."""

    exits: Counter[int] = field(default_factory=Counter)
    """Tokens scored and generated, by the layer of their exit."""
    layers_run: int = 0
    """Passes through a layer while generating."""
    layers_full: int = 0
    """What full depth would have taken."""
    truncated: int = 0
    """Requests that had more tokens than the model's context, and lost their beginning."""


@register_model("eellm")
class EellmLM(TemplateLM):
    """Answers lm-eval's requests at full depth, at one exit, or under the exit policy."""

    def __init__(
        self,
        pretrained: str | EarlyExitLM,
        adapter: str | None = None,
        *,
        exit: int | None = None,
        threshold: float | None = None,
        policy: Any = "max_prob",
        exits: str | int | Sequence[int] | None = None,
        batch_size: int | str = 16,
        max_batch_size: int | None = None,
        max_gen_toks: int = 256,
        quantize: Quantize | None = None,
        dtype: str = "float32",
        device: str | None = None,
    ) -> None:
        """pretrained, adapter: as for `eellm.load`. exit, threshold, policy, exits: see `ExitRule`; several layers as
        "3+6", since lm-eval takes commas for itself. batch_size, max_batch_size: requests generated at the same time
        (texts that are scored share passes by themselves). max_gen_toks: new tokens, where a task names no number."""
        super().__init__()
        model = pretrained
        if not isinstance(model, EarlyExitLM):
            model = load(model, adapter, dtype=dtype, device=_device(device))
        if model.tokenizer is None:
            raise ConfigError("the model has no tokenizer, and tasks are text; add its tokenizer.json")
        self.model = model
        self._tokenizer = model.tokenizer
        layers = exits.split("+") if isinstance(exits, str) else [exits] if isinstance(exits, int) else exits
        self.rule = ExitRule(
            exit=exit,
            threshold=None if threshold is None else float(threshold),
            policy=policy,
            exits=None if layers is None else tuple(map(int, layers)),
        )
        size = max_batch_size or 16 if batch_size == "auto" else int(batch_size)
        self.max_gen_toks = max_gen_toks
        self.max_length = model.config.max_seq_len
        self.engine = Engine(model, max_batch=size, max_tokens=self.max_length, quantize=quantize)
        self.counts = Counts()

    # --- text and ids ---

    @property
    def eot_token_id(self) -> int:
        ends = (self._tokenizer.eos_id, *self.model.config.eos_token_ids)
        return self._named(next((end for end in ends if end is not None), None))

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is: the token that begins a text, or that ended the one before."""
        bos = self._tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    def _named(self, token: int | None) -> int:
        if token is None:
            raise ConfigError("the model names no token that ends a text; its tokenizer_config.json must (eos_token)")
        return token

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text; special tokens as the tokenizer adds them, unless the text begins with them (a chat)."""
        if add_special_tokens is None:
            bos = self._tokenizer.bos_id
            begins = bos is not None and string.startswith(self._tokenizer.decode([bos], skip_special_tokens=False))
            add_special_tokens = not begins
        return self._tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _encode_pair(self, context: str, continuation: str) -> Pair:
        """The same as `Engine.score` makes of the two."""
        return split_pair(self.tok_encode, context, continuation)

    @property
    def tokenizer_name(self) -> str:
        return self._tokenizer.fingerprint

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._tokenizer.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages as text; without the prompt for an answer, the last message is the beginning of one."""
        if add_generation_prompt:
            return self._tokenizer.apply_chat(chat_history)
        *before, begun = chat_history
        return self._tokenizer.apply_chat(before) + begun["content"]

    # --- what lm-eval asks ---

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        answers = self._score([(context, continuation) for _, context, continuation in requests])
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request[0], answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Of whole texts. One that is longer than the model's context is cut into windows of that length; the last
        one sees as much as the others."""
        windows: list[Pair] = []
        owners = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            for pair in get_rolling_token_windows(
                tokens, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            ):
                windows.append(make_disjoint_window(pair))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._score(windows), strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        truncated, fields = self.counts.truncated, self.rule.generating(self.model.config.num_layers)
        handles = []
        for request in requests:
            context, options = request.args
            new_tokens, options = self._options(options)
            tokens = self._fitting(self.tok_encode(context) or [self.prefix_token_id], self.max_length - new_tokens)
            handles.append(self.engine.submit(tokens, max_new_tokens=new_tokens, **options, **fields))
        self._warn(truncated, len(requests))
        texts = []
        for number, (request, handle) in enumerate(zip(requests, handles, strict=True), 1):
            out = handle.result()
            self.counts.exits.update(out.exits)
            self.counts.layers_run += out.stats.layers_run
            self.counts.layers_full += out.stats.layers_full
            texts.append(out.text or "")
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
            _progress(number - 1, number, len(requests), "generated")
        return texts

    # --- how it is asked of the engine ---

    def _score(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Of each continuation, its log-likelihood and whether greedy decoding would say it."""
        answers = [(0.0, True)] * len(pairs)  # what nothing follows is certain
        truncated, fields = self.counts.truncated, self.rule.scoring()
        asked = sorted(
            (i for i, pair in enumerate(pairs) if pair[1]), key=lambda i: len(pairs[i][0]) + len(pairs[i][1])
        )
        for start in range(0, len(asked), TEXTS):
            some = asked[start : start + TEXTS]
            scores = self.engine.score([self._cut(pairs[i]) for i in some], **fields)
            for i, score in zip(some, scores, strict=True):
                answers[i] = score.logprob, all(score.is_likeliest)
                self.counts.exits.update(score.exits)
            _progress(start, start + len(some), len(asked), "scored")
        self._warn(truncated, len(pairs))
        return answers

    def _cut(self, pair: Pair) -> Pair:
        """A context without the beginning that the model has no room for; its last token predicts and isn't fed."""
        context, continuation = pair[0] or [self.prefix_token_id], pair[1]
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise RequestError(
                f"a continuation has {len(continuation)} tokens; the model's context is {self.max_length}"
            )
        return self._fitting(context, room), continuation

    def _fitting(self, tokens: list[int], room: int) -> list[int]:
        self.counts.truncated += len(tokens) > room
        return tokens[-room:]

    def _options(self, given: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """A task's `generation_kwargs` → the number of new tokens, and fields of `GenerateConfig`."""
        for name in given:
            if name not in OPTIONS:
                raise RequestError(f"generation_kwargs: {name!r} isn't known here{did_you_mean(name, OPTIONS)}")
        new_tokens = int(given.get("max_gen_toks", self.max_gen_toks))
        if not 0 < new_tokens < self.max_length:
            raise RequestError(f"max_gen_toks = {new_tokens}: the model's context is {self.max_length}")
        until = given.get("until") or []
        stops = tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop)
        drawn = {name: given[name] for name in SAMPLING if name in given} if given.get("do_sample") else {}
        return new_tokens, {"stop": stops, "sampling": Sampling(**drawn)}

    def _warn(self, before: int, num_requests: int) -> None:
        if cut := self.counts.truncated - before:
            log.warning(
                f"{cut} of {num_requests} requests have more tokens than there is room for in the model's context "
                f"({self.max_length}), and lost their beginning"
            )


def _device(name: str | None) -> str:
    """lm-eval's command line says cuda:0 where nobody said anything, whether there is one or not."""
    if name is None or (name.startswith("cuda") and not torch.cuda.is_available()):
        return "cpu"
    return name


def _progress(before: int, done: int, total: int, what: str) -> None:
    """A line at every tenth of the way."""
    if 10 * done // total > 10 * before // total and total >= TEXTS:
        log.info(f"{what} {done} of {total}")


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
