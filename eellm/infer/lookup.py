"""Drafts for nothing: what followed the same words earlier in the text. Without torch.

A text often repeats itself: names, code, quotations, loops. The last few tokens are looked up in what was there before,
and the tokens behind their latest earlier occurrence are proposed; the model judges them like any other draft.
Sources: copying reference text under verification is LLMA (Yang et al., arXiv 2304.04487); matching the last n tokens
against the prompt is Prompt Lookup Decoding (A. Saxena, 2023).
"""

from collections.abc import Iterable


class PromptLookup:
    def __init__(self, tokens: Iterable[int] = (), *, max_ngram: int = 3, min_ngram: int = 2) -> None:
        """tokens: the prompt. max_ngram, min_ngram: how many last tokens must match; the most are tried first."""
        assert 1 <= min_ngram <= max_ngram, f"n-grams of {min_ngram} to {max_ngram} tokens"
        self._sizes = range(max_ngram, min_ngram - 1, -1)
        self._tokens: list[int] = []
        self._behind: dict[tuple[int, ...], int] = {}
        """Of each n-gram, the index behind its latest occurrence. The one that ends the text isn't there yet: nothing
        has followed it."""
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """One more token of the text; takes the same time however long that is."""
        end = len(self._tokens)
        for size in self._sizes:
            if size <= end:
                self._behind[tuple(self._tokens[end - size :])] = end
        self._tokens.append(token)

    def draft(self, num_tokens: int) -> list[int]:
        """So many tokens that may come next; none where the last ones are new.

        Where the earlier occurrence is so near that the text ends before, the proposal goes on with itself: a loop goes
        round.
        """
        end = len(self._tokens)
        for size in self._sizes:
            start = self._behind.get(tuple(self._tokens[end - size :])) if size <= end else None
            if start is not None:
                period = end - start
                return [self._tokens[start + i % period] for i in range(num_tokens)]
        return []
