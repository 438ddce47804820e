"""From what a user asks to what can be run: a prompt's token ids and the exits in use, all checked before any work."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from eellm.config.calibrate import Certificate
from eellm.config.check import check_whole
from eellm.config.infer import POLICY, GenerateConfig, PolicyName, generate_config, thresholds_by_layer
from eellm.errors import CertificateError, ConfigError, RequestError
from eellm.exits.certified import certified
from eellm.exits.lm import EarlyExitLM
from eellm.text.tokenizer import Tokenizer

Message = Mapping[str, str]
Prompt = str | Sequence[int] | Sequence[Message]


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt with its options, ready to run."""

    tokens: list[int]
    thresholds: dict[int, float]
    """By layer, the exits that can be taken. Empty: full depth."""
    policy: PolicyName
    """The score that says how sure they are."""
    options: GenerateConfig
    certificate: Certificate | None = None
    """Where thresholds and policy come from, if a risk was asked for."""

    def capacity(self, max_seq_len: int) -> int:
        """Rows that the caches must hold."""
        return min(len(self.tokens) + self.options.max_new_tokens, max_seq_len)


def make_request(model: EarlyExitLM, prompt: Prompt, options: GenerateConfig) -> Request:
    """Raises RequestError for a prompt that can't be served, ConfigError for options that the model doesn't have."""
    tokens = prompt_tokens(model, prompt)
    limit = model.config.max_seq_len
    if len(tokens) >= limit:
        raise RequestError(
            f"the prompt has {len(tokens)} tokens; the model's context is {limit} and needs room for one"
        )
    if options.stop and model.tokenizer is None:
        raise RequestError("stop strings need a tokenizer, and the model has none")
    return _request(model, tokens, options)


def make_scoring(
    model: EarlyExitLM, text: "Prompt | tuple[Prompt, Prompt]", exit: int | None, fields: Mapping[str, Any]
) -> tuple[Request, int]:
    """What is to be scored, and the index of its first token that is.

    exit: the layer of the one exit that all tokens take. fields: of the exit policy; none: full depth.
    Raises RequestError for a text that can't be scored, ConfigError for an exit that the model doesn't have.
    """
    if exit is not None:
        check_whole("exit", exit, 1)
    if exit is not None and fields:
        raise RequestError(f"exit = {exit} takes one exit for all tokens; leave out {', '.join(fields)}")
    if exit == model.config.num_layers:
        exit = None
    if exit is not None:
        fields = {"exits": (exit,), "threshold": 0.0}
    options = generate_config(method="early" if fields else "full", **fields)
    if isinstance(text, tuple) and len(text) == 2 and not isinstance(text[0], int):
        context, continuation = _pair_tokens(model, *cast("tuple[Prompt, Prompt]", text))
        tokens, first = [*context, *continuation], len(context)
    else:
        tokens, first = prompt_tokens(model, cast("Prompt", text)), 1
    if len(tokens) < 2:
        raise RequestError("a text of one token has nothing to score: the first token is given")
    if len(tokens) > model.config.max_seq_len + 1:
        raise RequestError(f"the text has {len(tokens)} tokens; the model's context is {model.config.max_seq_len}")
    return _request(model, tokens, options), first


def check_certified(request: Request, quantize: str | None) -> None:
    """Raises CertificateError where the engine doesn't compute with the weights that the certificate is for. quantize:
    what it rounds them to."""
    if request.certificate is not None and quantize is not None:
        raise CertificateError(
            f"risk = {request.options.risk:g}: certificates are for the weights as they are, not for those rounded "
            f"to {quantize}; leave quantize out, or give a threshold"
        )


def _pair_tokens(model: EarlyExitLM, context: Prompt, continuation: Prompt) -> tuple[list[int], list[int]]:
    """One text in two parts: only its beginning gets what the tokenizer puts in front of texts."""
    if not len(context):
        context = [prefix_token(model)]
        if isinstance(continuation, str):
            continuation = _tokenizer(model).encode(continuation, add_special_tokens=False)
    elif isinstance(context, str) and isinstance(continuation, str) and continuation:
        before, after = split_pair(_tokenizer(model).encode, context, continuation)
        return before or [prefix_token(model)], after
    elif isinstance(continuation, str):
        continuation = _tokenizer(model).encode(continuation, add_special_tokens=False)
    return prompt_tokens(model, context), prompt_tokens(model, continuation)


def split_pair(encode: Callable[..., list[int]], context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of a text, cut where its continuation begins, as lm-eval does: spaces between the two belong to the
    continuation. One that a single token holds together with the context's end is encoded by itself."""
    spaces = context[len(context.rstrip()) :]
    context, continuation = context.rstrip(), spaces + continuation
    before = encode(context)
    after = encode(context + continuation)[len(before) :]
    return before, after or encode(continuation, add_special_tokens=False)


def prefix_token(model: EarlyExitLM) -> int:
    """What stands in front of a text that has nothing in front: the token that begins a text, or that ended the one
    before. Raises RequestError where the model names neither."""
    tokenizer, ends = model.tokenizer, model.config.eos_token_ids
    known = (*((tokenizer.bos_id, tokenizer.eos_id) if tokenizer is not None else ()), *ends)
    for token in known:
        if token is not None:
            return token
    raise RequestError(
        "the context is empty, and the model names no token that begins or ends a text (bos_token, eos_token in "
        "tokenizer_config.json); give a context"
    )


def check_prompts(prompts: Sequence[Prompt]) -> Sequence[Prompt]:
    """Raises RequestError for a single prompt in place of a list of them."""
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int | Mapping)):
        raise RequestError("prompts must be a list of prompts; put the single one in a list")
    return prompts


def prompt_tokens(model: EarlyExitLM, prompt: Prompt) -> list[int]:
    """A string is encoded, messages go through the chat template, token ids are checked and taken as they are."""
    tokens: list[Any]
    if isinstance(prompt, str):
        tokens = _tokenizer(model).encode(prompt) if prompt else []
    elif prompt and isinstance(prompt[0], Mapping):
        tokenizer = _tokenizer(model)
        messages = cast("Sequence[Message]", prompt)
        tokens = tokenizer.encode(tokenizer.apply_chat(messages), add_special_tokens=False)
    else:
        tokens = list(prompt)
    if not tokens:
        raise RequestError("the prompt is empty")
    size = model.config.vocab_size
    for token in tokens:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < size:
            raise RequestError(f"prompt token {token!r}: ids are whole numbers from 0 to {size - 1}")
    return tokens


def _tokenizer(model: EarlyExitLM) -> Tokenizer:
    if model.tokenizer is None:
        raise RequestError("the model has no tokenizer; give the prompt as a list of token ids")
    return model.tokenizer


def _request(model: EarlyExitLM, tokens: list[int], options: GenerateConfig) -> Request:
    """With the exit rule that the options or a certificate give. Raises ConfigError, CertificateError."""
    if options.risk is not None:
        certificate = certified(model, options.risk, options.risk_metric)
        thresholds = {layer: tau for layer, tau in sorted(certificate.by_layer.items()) if tau < 1}
        policy = certificate.policy
        return Request(tokens=tokens, thresholds=thresholds, policy=policy, options=options, certificate=certificate)
    return Request(
        tokens=tokens, thresholds=_thresholds(model, options), policy=options.policy or POLICY, options=options
    )


def _thresholds(model: EarlyExitLM, options: GenerateConfig) -> dict[int, float]:
    thresholds = thresholds_by_layer(options, model.config.exit_layers) if options.method != "full" else {}
    if options.policy == "gate":
        for layer in thresholds:
            if model.exit(layer).gate is None:
                raise ConfigError(
                    f"policy = 'gate': the exit at layer {layer} has no gate; tune one, or use 'max_prob'"
                )
    return thresholds
