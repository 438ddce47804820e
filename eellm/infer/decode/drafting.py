"""How much a sequence drafts in its next round, and by whom."""

from collections.abc import Mapping, Sequence

from eellm.infer.lookup import PromptLookup


class Drafting:
    """A fixed length, by all exits; looked up first where the words were there before."""

    def __init__(self, prompt: Sequence[int], *, max_draft: int, lookup: bool) -> None:
        self.max_draft = max_draft
        self.lookup = PromptLookup(prompt) if lookup else None
        self.num_known = len(prompt)
        self.num_drafts = 0
        """Of this round, at the most."""
        self.bonus = False
        """Whether the last draft's own row goes along, for a token more if all are right."""

    def exits(self, thresholds: Mapping[int, float]) -> Mapping[int, float]:
        """Those that draft in this round."""
        return thresholds

    def begin(self, tokens: Sequence[int], most: int) -> list[int]:
        """Starts a round of at most `most` drafts; returns those that are looked up."""
        looked_up: list[int] = []
        if self.lookup is not None:
            for token in tokens[self.num_known :]:
                self.lookup.append(token)
            self.num_known = len(tokens)
            looked_up = self.lookup.draft(min(self.max_draft, most)) if most > 0 else []
        self.num_drafts = len(looked_up) or max(0, min(self.max_draft, most))
        return looked_up

    def judged(self, layers: Sequence[int], num_right: int) -> None:
        """How the round ended. layers: of the drafts; the last layer for those looked up."""
