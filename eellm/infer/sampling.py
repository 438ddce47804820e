"""Drawing a token from logits: penalties → temperature → top-k → top-p → min-p → choice.

The choice at each place of an answer is made by that place's luck (`eellm.infer.luck`), which follows from the
request's seed alone. So whoever draws there draws alike: an exit that drafts, the final exit that judges it, and full
depth.
Shapes: V vocabulary.
"""

import secrets
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from eellm.config.infer import Sampling
from eellm.infer.luck import chosen


class Sampler:
    """One request's sampling state: its seed, its place in the answer, and the tokens that penalties apply to."""

    def __init__(self, sampling: Sampling, prompt: Iterable[int], device: torch.device) -> None:
        self.sampling = sampling
        self.seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        self.place = 0
        """Of the next token: how many of the answer's were accepted."""
        self.seen = torch.tensor(sorted(set(prompt)), device=device)
        self.said: list[int] = []
        """The answer's tokens, where penalties count them."""
        self.penalises_seen = sampling.repetition_penalty != 1.0
        self.penalises_said = sampling.presence_penalty != 0 or sampling.frequency_penalty != 0

    @property
    def takes_likeliest(self) -> bool:
        """Whether the token is always the one with the largest raw logit: then nothing needs to be drawn."""
        return self.sampling.temperature == 0 and not (self.penalises_seen or self.penalises_said)

    def draw(self, logits_V: Tensor) -> int:
        """The next token's id, from raw float32 logits. Penalties apply to it from then on."""
        token = self.token(logits_V)
        self.accept(token)
        return token

    def token(self, logits_V: Tensor, drafted: Sequence[int] = ()) -> int:
        """The token that these raw float32 logits give behind the drafted ones, which aren't accepted yet."""
        return self.choice(self.probabilities(logits_V, drafted), self.place + len(drafted))

    def choice(self, probabilities_V: Tensor, place: int) -> int:
        """The token that is chosen from any distribution at this place of the answer."""
        return chosen(probabilities_V, self.seed, place)

    def accept(self, token: int) -> None:
        """The answer goes on with `token`; penalties apply to it from now on."""
        self.place += 1
        if self.penalises_seen:
            self.seen = torch.cat((self.seen, self.seen.new_tensor([token])))
        if self.penalises_said:
            self.said.append(token)

    def probabilities(self, logits_V: Tensor, drafted: Sequence[int] = ()) -> Tensor:
        """What a token is drawn with: (V,), summing to 1. All of it on one token under temperature 0.

        drafted: tokens that come before it but aren't accepted yet; penalties apply to them too.
        """
        logits_V = self._penalised(logits_V, drafted)
        if self.sampling.temperature == 0:
            return torch.zeros_like(logits_V).index_fill(0, logits_V.argmax(), 1.0)
        distance_V = logits_V - logits_V.max()  # so that a tiny temperature overflows to -inf, never to inf
        temperature = max(self.sampling.temperature, torch.finfo(logits_V.dtype).tiny)  # less is rounded to 0
        probabilities_V = filtered(distance_V / temperature, self.sampling)
        return probabilities_V / probabilities_V.sum()

    def _penalised(self, logits_V: Tensor, drafted: Sequence[int]) -> Tensor:
        if self.penalises_seen:
            seen = torch.cat((self.seen, self.seen.new_tensor(drafted))) if drafted else self.seen
            logits_V = penalised(logits_V, seen, self.sampling.repetition_penalty)
        if self.penalises_said and (said := [*self.said, *drafted]):
            logits_V = lowered(logits_V, said, self.sampling.presence_penalty, self.sampling.frequency_penalty)
        return logits_V


def penalised(logits_V: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Makes tokens seen before less likely, for a penalty above 1 (CTRL, arXiv 1909.05858)."""
    chosen = logits_V[seen]
    kind = torch.finfo(logits_V.dtype)  # neither the penalty nor what it makes of a logit may be 0 or infinite in it
    penalty = min(max(penalty, kind.tiny), kind.max)
    changed = torch.where(chosen > 0, chosen / penalty, chosen * penalty).clamp(-kind.max, kind.max)
    return logits_V.index_copy(0, seen, changed)


def lowered(logits_V: Tensor, said: Sequence[int], presence: float, frequency: float) -> Tensor:
    """OpenAI's penalties: logit - presence · (was said) - frequency · (times it was said)."""
    tokens, counts = torch.tensor(said, device=logits_V.device).unique(return_counts=True)
    most = torch.finfo(logits_V.dtype).max  # neither the penalty nor what it makes of a logit may be infinite
    changed = logits_V[tokens].double() - (presence + frequency * counts.double()).clamp(-most, most)
    return logits_V.index_copy(0, tokens, changed.clamp(-most, most).to(logits_V.dtype))


def filtered(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities after top-k, top-p and min-p, each on what the one before left. The likeliest always stays."""
    if 0 < sampling.top_k < logits_V.shape[-1]:
        kth = logits_V.topk(sampling.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < kth, -torch.inf)
    if sampling.top_p < 1:
        sorted_V, order = logits_V.softmax(-1).sort(descending=True)
        beyond = sorted_V.cumsum(-1) - sorted_V >= sampling.top_p
        beyond[0] = False
        logits_V = logits_V.masked_fill(torch.zeros_like(beyond).scatter(0, order, beyond), -torch.inf)
    probabilities_V = logits_V.softmax(-1)
    if sampling.min_p > 0:
        probabilities_V = probabilities_V.where(probabilities_V >= sampling.min_p * probabilities_V.max(), 0)
    return probabilities_V
