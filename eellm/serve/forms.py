"""Answers as OpenAI writes them: completions and chats, whole or in chunks, with log-probabilities.

Plain dicts, made once per hand-over: nothing here is validated, the contract is held by tests.
"""

import math
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii
from typing import Any

from eellm.infer.result import Stats, Token
from eellm.infer.score import Score
from eellm.serve.ask import Ask
from eellm.serve.refusals import dump
from eellm.text.stream import StreamDecoder, token_bytes
from eellm.text.tokenizer import Tokenizer

FINISH = {"eos": "stop", "stop": "stop", "length": "length"}
_PLACE = "\0the text"
LEAST = -9999.0
"""Stands for minus infinity, which JSON can't say."""


class Names:
    """What tokens are called, and their bytes. One per model; it remembers."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, list[int]]] = {}

    def __getitem__(self, token_id: int) -> tuple[str, list[int]]:
        """A token that is only a part of a character is called by its bytes, so that no two share a name for it."""
        if token_id not in self._known:
            raw = f"<{token_id}>".encode() if self._tokenizer is None else token_bytes(self._tokenizer, token_id)
            try:
                name = raw.decode()
            except UnicodeDecodeError:
                name = "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
            self._known[token_id] = (name, list(raw))
        return self._known[token_id]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A token as log-probabilities tell it."""

    id: int
    text: str
    """What it added to the answer."""
    logprob: float | None
    """None: nothing was before it."""
    top: Sequence[tuple[int, float]]
    exit: int | None
    confidence: float | None
    passed: Sequence[tuple[int, float]]


def entry_of(token: Token, ask: Ask) -> Entry:
    return Entry(
        id=token.id,
        text=token.text,
        logprob=token.logprob,
        top=token.top if ask.top_logprobs else (),
        exit=token.exit,
        confidence=token.confidence,
        passed=token.passed if ask.report else (),
    )


class Form(ABC):
    """One request's answer. `Completions` and `Chats` say what a choice looks like."""

    prefix: str
    kinds: tuple[str, str]
    """What the whole and a chunk are called."""

    def __init__(self, ask: Ask, names: Names, model: str) -> None:
        self.ask, self.names, self.model = ask, names, model
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self._around: dict[int, tuple[bytes, bytes]] = {}

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return self._envelope(0, choices) | {"usage": usage}

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._envelope(1, choices) | ({"usage": None} if self.ask.wants_usage else {})

    def last_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        return self._envelope(1, []) | {"usage": usage}

    @abstractmethod
    def choice(self, index: int, tokens: Sequence[Token], finish: str | None) -> dict[str, Any]:
        """A whole choice."""

    @abstractmethod
    def delta(self, index: int, tokens: Sequence[Token], finish: str | None) -> dict[str, Any] | None:
        """What `tokens` add to a choice; None: nothing that can be seen."""

    @abstractmethod
    def delta_of(self, index: int, text: str) -> dict[str, Any]:
        """Text alone."""

    def event(self, index: int, tokens: Sequence[Token], finish: str | None) -> bytes:
        """A server-sent event with what `tokens` add to a choice; empty: nothing that can be seen.

        Where only text is new, it is put into an event made before: this is done for every token.
        """
        if finish is None and not self.ask.wants_logprobs and index in self._around:
            text = "".join(token.text for token in tokens)
            before, after = self._around[index]
            return before + encode_basestring_ascii(text).encode("ascii") + after if text else b""
        delta = self.delta(index, tokens, finish)
        if index not in self._around:
            made = event_of(self.chunk([self.delta_of(index, _PLACE)]))
            before, _, after = made.partition(encode_basestring_ascii(_PLACE).encode("ascii"))
            self._around[index] = before, after
        return b"" if delta is None else event_of(self.chunk([delta]))

    def _envelope(self, kind: int, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": self.kinds[kind],
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


class Chats(Form):
    prefix = "chatcmpl"
    kinds = ("chat.completion", "chat.completion.chunk")

    def choice(self, index: int, tokens: Sequence[Token], finish: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": "".join(token.text for token in tokens)}
        return {"index": index, "message": message, "logprobs": self._logprobs(tokens), "finish_reason": finish}

    def opening(self, index: int) -> dict[str, Any]:
        """The first chunk's choice says who speaks."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def delta(self, index: int, tokens: Sequence[Token], finish: str | None) -> dict[str, Any] | None:
        text = "".join(token.text for token in tokens)
        if not text and finish is None and not self.ask.wants_logprobs:
            return None
        delta = {"content": text} if text or tokens else {}
        return {"index": index, "delta": delta, "logprobs": self._logprobs(tokens), "finish_reason": finish}

    def delta_of(self, index: int, text: str) -> dict[str, Any]:
        return {"index": index, "delta": {"content": text}, "logprobs": None, "finish_reason": None}

    def _logprobs(self, tokens: Iterable[Token]) -> dict[str, Any] | None:
        if not self.ask.wants_logprobs:
            return None
        return {"content": [self._entry(entry_of(token, self.ask)) for token in tokens], "refusal": None}

    def _entry(self, entry: Entry) -> dict[str, Any]:
        assert entry.logprob is not None, "only a prompt's first token has none"
        made = self._named(entry.id, entry.logprob)
        made["top_logprobs"] = [self._named(token_id, logprob) for token_id, logprob in entry.top]
        return made | (report_of(entry) if self.ask.report else {})

    def _named(self, token_id: int, logprob: float) -> dict[str, Any]:
        name, raw = self.names[token_id]
        return {"token": name, "logprob": finite(logprob), "bytes": raw}


class Completions(Form):
    prefix = "cmpl"
    kinds = ("text_completion", "text_completion")

    def __init__(self, ask: Ask, names: Names, model: str, echoes: Sequence[tuple[str, list[Entry]]]) -> None:
        """echoes: text and entries of each prompt, where they are to be said again."""
        super().__init__(ask, names, model)
        self._echoes = echoes
        self._offsets: dict[int, int] = {}

    def choice(self, index: int, tokens: Sequence[Token], finish: str | None) -> dict[str, Any]:
        text, entries = self._echo(index)
        text += "".join(token.text for token in tokens)
        entries = [*entries, *(entry_of(token, self.ask) for token in tokens)] if self.ask.wants_logprobs else []
        logprobs = self._logprobs(index, entries)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def delta(self, index: int, tokens: Sequence[Token], finish: str | None) -> dict[str, Any] | None:
        is_first = index not in self._offsets and bool(self._echoes)
        choice = self.choice(index, tokens, finish) if is_first else self._rest(index, tokens, finish)
        seen = choice["text"] or finish is not None or self.ask.wants_logprobs
        return choice if seen else None

    def delta_of(self, index: int, text: str) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": None}

    def _rest(self, index: int, tokens: Sequence[Token], finish: str | None) -> dict[str, Any]:
        logprobs = None
        if self.ask.wants_logprobs:
            logprobs = self._logprobs(index, [entry_of(token, self.ask) for token in tokens])
        text = "".join(token.text for token in tokens)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _echo(self, index: int) -> tuple[str, list[Entry]]:
        return self._echoes[index // self.ask.body.n] if self._echoes else ("", [])

    def _logprobs(self, index: int, entries: Sequence[Entry]) -> dict[str, Any] | None:
        offset = self._offsets.setdefault(index, 0)
        if not self.ask.wants_logprobs:
            return None
        offsets = []
        for entry in entries:
            offsets.append(offset)
            offset += len(entry.text)
        self._offsets[index] = offset
        logprobs = [None if entry.logprob is None else finite(entry.logprob) for entry in entries]
        made = {
            "tokens": [self.names[entry.id][0] for entry in entries],
            "token_logprobs": logprobs,
            "top_logprobs": [self._top(entry) for entry in entries] if self.ask.top_logprobs else None,
            "text_offset": offsets,
        }
        if self.ask.report:
            reports = [report_of(entry) for entry in entries]
            made |= {key: [report[key] for report in reports] for key in ("exit_layer", "confidence", "passed")}
        return made

    def _top(self, entry: Entry) -> dict[str, float] | None:
        """The likeliest, and the one drawn."""
        if entry.logprob is None:
            return None
        pairs = [*entry.top, (entry.id, entry.logprob)]
        return {self.names[token_id][0]: finite(logprob) for token_id, logprob in pairs}


def echoes_of(ask: Ask, tokenizer: Tokenizer | None, scores: Sequence[Score | None]) -> list[tuple[str, list[Entry]]]:
    """Each prompt's text, and its tokens' entries where they were scored."""
    made = []
    for prompt, score in zip(ask.prompts, scores, strict=True):
        pieces = _pieces(prompt.tokens, tokenizer)
        text = "".join(pieces) if prompt.text is None else prompt.text
        entries = [
            Entry(id=prompt.tokens[0], text=pieces[0], logprob=None, top=(), exit=None, confidence=None, passed=())
        ]
        if score is not None:
            tops = score.top if ask.top_logprobs else [()] * len(score.tokens)
            columns = zip(score.tokens, pieces[1:], score.logprobs, tops, score.exits, score.confidences, strict=True)
            entries += [
                Entry(id=i, text=piece, logprob=logprob, top=top, exit=exit, confidence=confidence, passed=())
                for i, piece, logprob, top, exit, confidence in columns
            ]
        made.append((text, entries if ask.wants_logprobs else []))
    return made


def _pieces(tokens: Sequence[int], tokenizer: Tokenizer | None) -> list[str]:
    """What each token adds to their text."""
    if tokenizer is None:
        return [""] * len(tokens)
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(token) for token in tokens]
    pieces[-1] += decoder.finish()
    return pieces


def report_of(entry: Entry) -> dict[str, Any]:
    passed = [{"exit_layer": layer, "confidence": confidence} for layer, confidence in entry.passed]
    return {"exit_layer": entry.exit, "confidence": entry.confidence, "passed": passed}


def usage_of(ask: Ask, stats: Iterable[Stats]) -> dict[str, Any]:
    """Prompts count once, however many answers they get."""
    stats = list(stats)
    new_tokens = sum(s.new_tokens for s in stats)
    usage: dict[str, Any] = {
        "prompt_tokens": ask.num_prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": ask.num_prompt_tokens + new_tokens,
    }
    if ask.report:
        counts = ("layers_run", "layers_full", "deep_passes", "drafted", "accepted", "prefill_s", "decode_s")
        usage["early_exit"] = {name: sum(getattr(s, name) for s in stats) for name in counts}
        weighted = sum(s.mean_exit_layer * s.new_tokens for s in stats)
        usage["early_exit"]["mean_exit_layer"] = weighted / new_tokens if new_tokens else None
    return usage


def event_of(data: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: %b\n\n" % dump(data)


def finite(number: float) -> float:
    return number if math.isfinite(number) else LEAST
