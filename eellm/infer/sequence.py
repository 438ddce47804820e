"""One request being served: where its rows are, what it feeds next, what has been emitted.

A row enters layer 1 with its token and passes the model's *stops*: the layers of the exits, in order, and the last
layer. `passed[i]` rows have passed stop i; those that have not passed stop i + 1 yet wait there, as hidden states.
The newest rows are the *frontier*: they must go on, until an exit answers (the rest of the way can then wait) or the
end is reached. Invariant: a stop's waiting rows are the newest `passed[i] - passed[i + 1]` of those that passed it.
"""

import math
import time
from collections import deque
from typing import TYPE_CHECKING

from eellm.errors import ModelError
from eellm.infer.decode.base import Decode
from eellm.infer.request import Request
from eellm.infer.result import Generation, Stats, Token, Work
from eellm.text.stream import StopStrings, StreamDecoder
from eellm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from eellm.infer.readout import Reading
    from eellm.infer.rows import Piece
    from eellm.infer.sampling import Sampler


class Sequence:
    def __init__(
        self,
        request: Request,
        decode: Decode,
        sampler: "Sampler",
        *,
        stops: tuple[int, ...],
        max_seq_len: int,
        eos_token_ids: tuple[int, ...],
        tokenizer: Tokenizer | None,
    ) -> None:
        self.request = request
        self.decode = decode
        self.sampler = sampler
        self.stops = stops
        self.room = request.capacity(max_seq_len) - len(request.tokens)
        """New tokens that may still be emitted."""
        self.eos_token_ids = () if request.options.ignore_eos else eos_token_ids
        self.slot = -1
        self.tokens = list(request.tokens)
        """The prompt and what was emitted."""
        self.pending = list(request.tokens)
        """Tokens whose rows enter layer 1 next."""
        self.passed = [0] * len(stops)
        self.waiting: list[list[Piece]] = [[] for _ in stops]
        self.frontier: int | None = None
        """Index of the stop that the frontier moves to next; None: it rests, or has reached the end."""
        self.answered = False
        """Whether the frontier's newest row has its token."""
        self.unsure: list[tuple[int, float]] = []
        """Exits that were asked about the newest row in vain: layer and score."""
        self.is_shared = False
        """Whether others may use the rows of its prompt."""
        self.ready_since = 0
        """The tick since which it can go on."""
        self.work = Work()
        self.new: deque[Token] = deque()
        """Emitted and not taken yet."""
        self.emitted: list[Token] = []
        self.finish_reason: str | None = None
        self._end: tuple[int, str] | None = None
        """Once the last token is on its way out: how many there are with it, and why it is the last."""
        self.failure: ModelError | None = None
        """Why it has failed, if it has."""
        self.times: list[float] = []
        """When it was admitted, and when each token was emitted."""
        self._decoder = StreamDecoder(tokenizer) if tokenizer is not None else None
        self._stops = StopStrings(request.options.stop)

    # --- what the scheduler sees ---

    @property
    def next_stop(self) -> int | None:
        """Index of the stop that its rows can move to; None: it is over."""
        if self.finish_reason is not None:
            return None
        return 0 if self.frontier is None else self.frontier

    @property
    def is_prompt(self) -> bool:
        """Whether the newest rows are the prompt's."""
        return self.passed[0] <= len(self.request.tokens)

    def num_waiting(self, stop: int) -> int:
        """Rows that have passed the stop with that index and not the next one."""
        return self.passed[stop] - self.passed[stop + 1]

    @property
    def num_deferred(self) -> int:
        return self.passed[0] - self.passed[-1]

    # --- moving rows ---

    def place(self, slot: int, num_reused: int) -> None:
        """The request gets its memory, where its first rows are true already."""
        self.slot = slot
        self.passed = [num_reused] * len(self.stops)
        self.pending = self.tokens[num_reused:]
        self.times = [time.perf_counter()]

    def enter(self, num_tokens: int) -> list[int]:
        """The next tokens to embed."""
        tokens, self.pending = self.pending[:num_tokens], self.pending[num_tokens:]
        self.answered = False
        return tokens

    def crop(self, num_rows: int) -> None:
        """Forgets all but the first rows; none may be waiting."""
        assert self.num_deferred == 0, "rows that are judged have reached the end"
        self.passed = [min(passed, num_rows) for passed in self.passed]

    def interrupt(self) -> None:
        """Ends it where it is, unless it has ended: its rows are lost, its tokens stand."""
        if self.finish_reason is None:
            num, reason = self._end or (-1, "")  # between the last token's lines: it is out, or it is lost
            self.finish_reason = reason if len(self.emitted) == num else "interrupted"
        self.waiting = []

    # --- tokens ---

    def at_exit(self, reading: "Reading") -> bool:
        """As `Decode.at_exit`."""
        return self._are_numbers([reading]) and self.decode.at_exit(self, reading)

    def at_end(self, readings: "list[Reading]") -> None:
        """As `Decode.at_end`."""
        if self._are_numbers(readings):
            self.decode.at_end(self, readings)

    def _are_numbers(self, readings: "list[Reading]") -> bool:
        """Whether the readings say anything. Where one doesn't, this request fails, and no other."""
        bad = next((reading for reading in readings if math.isnan(reading.logprob)), None)
        if bad is not None and self.finish_reason is None:
            self.failure, self.finish_reason = ModelError.no_numbers(bad.layer), "failed"
        return bad is None

    def answer(self, reading: "Reading") -> None:
        """Draws the next token from a row's logits, emits it, and feeds it."""
        token = reading.token if self.sampler.takes_likeliest else self.sampler.draw(reading.logits_V)
        self.answered = True
        self.emit(token, reading.layer, reading)
        self.pending = [token]

    def emit(self, token: int, layer: int, reading: "Reading") -> None:
        """One more token of the answer; nothing after the end. layer: of the exit that it is said to come from."""
        passed, self.unsure = tuple(self.unsure), []
        if self.finish_reason is not None:
            return
        self.room -= 1
        is_eos = token in self.eos_token_ids
        text, stopped = self._text_of(token, last=is_eos or self.room == 0)
        if stopped or is_eos or self.room == 0:
            self._end = (len(self.emitted) + 1, "stop" if stopped else "eos" if is_eos else "length")
        self.tokens.append(token)
        self.times.append(time.perf_counter())
        num_top = self.request.options.top_logprobs
        new = Token(
            id=token,
            text=text,
            exit=layer,
            confidence=reading.score,
            logprob=reading.logprob_of(token),
            top=reading.top(num_top) if num_top else (),
            passed=passed,
        )
        self.new.append(new)
        self.emitted.append(new)
        if self._end is not None:
            self.finish_reason = self._end[1]

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

    # --- results ---

    def stats(self) -> Stats:
        """What it cost so far."""
        num, work = len(self.emitted), self.work
        first_s = self.times[1] - self.times[0] if num else 0.0
        decode_s = self.times[-1] - self.times[1] if num else 0.0
        rate = (num - 1) / decode_s if num > 1 else 1 / first_s if num else 0.0
        return Stats(
            prompt_tokens=len(self.request.tokens),
            new_tokens=num,
            prefill_s=first_s,
            decode_s=decode_s,
            tokens_per_s=rate,
            mean_exit_layer=sum(token.exit for token in self.emitted) / num if num else 0.0,
            layers_run=work.layers,
            layers_full=self.stops[-1] * num,
            deep_passes=work.deep_passes,
            heads_run=dict(sorted(work.heads.items())),
            drafted=work.drafted,
            accepted=work.accepted,
        )

    def generation(self) -> Generation:
        """The whole, once it is over."""
        assert self.finish_reason is not None, "the request is still running"
        tokens = self.emitted
        return Generation(
            text="".join(t.text for t in tokens) if self._decoder is not None else None,
            tokens=[t.id for t in tokens],
            exits=[t.exit for t in tokens],
            confidences=[t.confidence for t in tokens],
            logprobs=[t.logprob for t in tokens],
            pieces=[t.text for t in tokens],
            finish_reason=self.finish_reason,
            stats=self.stats(),
        )
