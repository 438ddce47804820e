"""A client's end of a request."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from eellm.errors import ModelError
from eellm.infer.request import Request
from eellm.infer.result import Generation, Stats, Token
from eellm.infer.sequence import Sequence

if TYPE_CHECKING:
    from eellm.infer.engine import Engine


class Handle(Iterator[Token]):
    """One request: iterating it yields its tokens, once, and drives the engine while there is none."""

    def __init__(self, engine: "Engine", seq: Sequence) -> None:
        self._engine = engine
        self._seq = seq

    def __next__(self) -> Token:
        while True:
            with self._engine.lock:  # given back at every tick, so that another thread can cancel
                if self._seq.new:
                    return self._seq.new.popleft()
                if self._seq.failure is not None:
                    raise ModelError(str(self._seq.failure))  # a new one, or it would collect the frames of all
                if self._seq.finish_reason is not None:
                    raise StopIteration
                self._engine.step()

    @property
    def request(self) -> Request:
        return self._seq.request

    @property
    def finish_reason(self) -> str | None:
        """None while it runs; see `Generation`."""
        return self._seq.finish_reason

    @property
    def failure(self) -> ModelError | None:
        """Why it has failed, if it has; iterating it raises this."""
        return self._seq.failure

    @property
    def exits(self) -> list[int]:
        """Of the tokens so far."""
        return [token.exit for token in self._seq.emitted]

    def take(self) -> list[Token]:
        """The tokens that are there and weren't taken yet; drives nothing."""
        with self._engine.lock:
            tokens = list(self._seq.new)
            self._seq.new.clear()
            return tokens

    def cancel(self) -> None:
        """Ends the request; its slot is free at once."""
        self._engine.cancel(self._seq)

    def stats(self) -> Stats:
        """What it cost so far."""
        return self._seq.stats()

    def result(self) -> Generation:
        """Runs it to its end; all tokens, those that were taken already among them."""
        for _ in self:
            pass
        return self._seq.generation()
