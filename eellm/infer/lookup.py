"""Drafts for nothing: what followed the same words earlier, in this text or in one that is finished. Without torch.

    the last tokens → where they were before → the tokens behind, as drafts

A text often repeats itself: names, code, quotations, loops. And an engine's texts repeat each other: the same
questions, forms, turns of phrase. The last few tokens are looked up, and those behind their latest earlier occurrence
are proposed; the model judges them like any other draft, so whatever is in a memory changes no text. The more tokens
match, the likelier the next ones do: the longest match wins, and its length is told.
Sources: copying reference text under verification is LLMA (Yang et al., arXiv 2304.04487); matching the last n tokens
against the prompt is Prompt Lookup Decoding (A. Saxena, 2023); against a store of texts, REST (arXiv 2311.08252).
"""

from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from eellm.errors import ConfigError

LENGTHS = (8, 5, 3, 2)
"""How many last tokens are looked up, the most first."""
END = -1
"""In the place of a token: the text is over."""


class Found(NamedTuple):
    """Drafts, and how many tokens matched before them."""

    tokens: list[int]
    length: int


NOTHING = Found([], 0)


class Places:
    """Of each n-gram, where its latest occurrence is followed."""

    def __init__(self, lengths: Sequence[int]) -> None:
        """lengths: of the n-grams, the longest first."""
        assert list(lengths) == sorted(set(lengths), reverse=True), f"{lengths} must fall"
        assert lengths[-1] >= 1, "a match has a token at least"
        self.lengths = tuple(lengths)
        self._behind: dict[tuple[int, ...], int] = {}

    def __len__(self) -> int:
        return len(self._behind)

    def add(self, tokens: Sequence[int], end: int, place: int) -> None:
        """What follows `tokens[:end]` is at `place`."""
        for length in self.lengths:
            if length <= end:
                self._behind[tuple(tokens[end - length : end])] = place

    def remove(self, tokens: Sequence[int], end: int, place: int) -> None:
        """Takes `add` back, but for what has occurred again since."""
        for length in self.lengths:
            ngram = tuple(tokens[end - length : end])
            if length <= end and self._behind.get(ngram) == place:
                del self._behind[ngram]

    def find(self, tokens: Sequence[int], longer_than: int = 0) -> tuple[int, int] | None:
        """The longest match of the last tokens, of more than so many: its place and its length."""
        end = len(tokens)
        for length in self.lengths:
            if longer_than < length <= end:
                place = self._behind.get(tuple(tokens[end - length :]))
                if place is not None:
                    return place, length
        return None


class Lookup:
    """A sequence's own text."""

    def __init__(self, tokens: Iterable[int] = (), *, lengths: Sequence[int] = LENGTHS) -> None:
        """tokens: the prompt."""
        self._tokens: list[int] = []
        self._places = Places(lengths)
        """The n-gram that ends the text isn't there yet: nothing has followed it."""
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """One more token of the text; takes the same time however long that is."""
        end = len(self._tokens)
        self._places.add(self._tokens, end, end)
        self._tokens.append(token)

    def draft(self, num_tokens: int) -> Found:
        """So many tokens that may come next; none where the last ones are new.

        Where the earlier occurrence is so near that the text ends before, the proposal goes on with itself: a loop goes
        round.
        """
        match = self._places.find(self._tokens)
        if match is None:
            return NOTHING
        start, length = match
        period = len(self._tokens) - start
        return Found([self._tokens[start + i % period] for i in range(num_tokens)], length)


class Recall:
    """An engine's memory of finished texts. Not to be used by two threads at once."""

    def __init__(self, capacity: int, *, lengths: Sequence[int] = LENGTHS) -> None:
        """capacity: tokens, the end of a text counting as one; beyond it the oldest texts are dropped whole. 0: nothing
        is remembered. Raises ConfigError for what is no capacity."""
        if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 0:
            raise ConfigError(f"recall = {capacity!r}: must be a whole number of tokens, at least 0 (0: no recall)")
        self.capacity = capacity
        self._lengths = lengths
        self.clear()

    def clear(self) -> None:
        """Forgets all."""
        self._ring = array("q")
        """The token at place p is at p modulo the capacity; grows up to that."""
        self._places = Places(self._lengths)
        self._texts: deque[tuple[int, int]] = deque()
        """From where to where, the oldest first; the places go up for ever."""
        self._end = 0

    @property
    def num_tokens(self) -> int:
        return self._end - self._texts[0][0] if self._texts else 0

    @property
    def num_ngrams(self) -> int:
        return len(self._places)

    def add(self, text: Sequence[int]) -> None:
        """Remembers a text, of one that is too long the end."""
        text = text[max(len(text) - self.capacity + 1, 0) :]
        if self.capacity == 0 or len(text) <= min(self._lengths):
            return  # nothing follows anything in it
        while self.num_tokens + len(text) + 1 > self.capacity:
            self._drop()
        start = self._end
        for token in (*text, END):
            self._put(token)
        self._texts.append((start, self._end))
        for end in range(1, len(text)):
            self._places.add(text, end, start + end)

    def draft(self, tokens: Sequence[int], num_tokens: int, *, longer_than: int = 0) -> Found:
        """Up to so many tokens that followed the last ones of `tokens` in a finished text, where more than
        `longer_than` match."""
        match = self._places.find(tokens, longer_than)
        if match is None:
            return NOTHING
        place, length = match
        found = []
        for at in range(place, place + num_tokens):
            token = self._ring[at % self.capacity]
            if token == END:
                break
            found.append(token)
        return Found(found, length)

    def _put(self, token: int) -> None:
        at = self._end % self.capacity
        if at == len(self._ring):
            self._ring.append(token)
        else:
            self._ring[at] = token
        self._end += 1

    def _drop(self) -> None:
        """The oldest text."""
        start, stop = self._texts.popleft()
        text = [self._ring[at % self.capacity] for at in range(start, stop - 1)]
        for end in range(1, len(text)):
            self._places.remove(text, end, start + end)
