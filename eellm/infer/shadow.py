"""A shadow sample: some tokens that left early are held against the final exit, to see whether certificates hold.

    token → drawn with some probability → its row goes on to the last layer → right or wrong → its certificate's Alarm

A token that no exit answered is drawn as often, and is right by itself: so what an alarm hears is a fair sample of all
tokens. A request's last token is never drawn, since nothing runs after it.
The alarm tests "at most a share `risk` of tokens is wrong" after every token heard, and is never more likely to ring
wrongly than 1 - `confidence`: it bets on larger shares at the fair price of the bound, and rings when its stake has
grown by more than such luck allows (a mixture of likelihood ratios, Ville's inequality; anytime-valid inference, arXiv
2210.01948). What has been won or lost is forgotten every `WINDOW` tokens, so that a year of good traffic doesn't hide
the day it changes; the k-th window may use 6 / (π k)² of the chance of a false alarm, and these sum to one. Pure
Python; no torch.
"""

import math
import random
from dataclasses import dataclass

from eellm.config.calibrate import Certificate
from eellm.errors import ConfigError
from eellm.log import log

WINDOW = 10_000
TIMES_RISK = (1.25, 1.5, 2, 3, 5, 8, 13, 25)
"""The shares that the alarm bets on, as multiples of the risk."""


class Alarm:
    """Rings, for good, once the tokens heard contradict a share of at most `risk` that are wrong."""

    def __init__(self, risk: float, confidence: float) -> None:
        self.is_ringing = False
        self._doubt = 1 - confidence
        shares = [min(times * risk, (1 + risk) / 2) for times in TIMES_RISK]
        self._wrong = [math.log(share / risk) for share in shares]
        self._right = [math.log((1 - share) / (1 - risk)) for share in shares]
        self._window = 1
        self._begin()

    def _begin(self) -> None:
        self._heard = 0
        self._stakes = [0.0] * len(self._wrong)  # logarithms; each bet has the same part of the whole

    @property
    def _limit(self) -> float:
        """The stake, as a logarithm, beyond which it was no luck."""
        return math.log((math.pi * self._window) ** 2 / 6 / self._doubt)

    def hear(self, is_wrong: bool) -> None:
        """One more token of the sample."""
        if self.is_ringing:
            return
        gains = self._wrong if is_wrong else self._right
        self._stakes = [stake + gain for stake, gain in zip(self._stakes, gains, strict=True)]
        self._heard += 1
        if is_wrong:  # right tokens only lose
            most = max(self._stakes)
            whole = most + math.log(math.fsum(math.exp(stake - most) for stake in self._stakes) / len(self._stakes))
            self.is_ringing = whole >= self._limit
        if self._heard == WINDOW:
            self._window += 1
            self._begin()


@dataclass(frozen=True)
class ShadowReport:
    """What was seen so far."""

    num_checked: int = 0
    """Tokens that left early and were held against the final exit."""
    num_wrong: int = 0
    """Of these, how many it would have chosen otherwise."""
    broken: tuple[tuple[Certificate, bool], ...] = ()
    """Certificates in use, and whether the sample contradicts them."""


class Shadow:
    """An engine's."""

    def __init__(self, share: float, *, seed: int = 0) -> None:
        """share: how likely a token is drawn. Raises ConfigError for what is no share."""
        if not 0 <= share <= 1:
            raise ConfigError(f"shadow = {share!r}: must lie between 0 and 1, as 0.01 does")
        self.share = share
        self._random = random.Random(seed)
        self._num_checked = self._num_wrong = 0
        self._alarms: dict[Certificate, Alarm] = {}

    def draws(self) -> bool:
        """Whether the next token is one of the sample."""
        return self.share > 0 and self._random.random() < self.share

    def checked(self, certificate: Certificate | None, *, is_wrong: bool) -> None:
        """A token that left early was held against the final exit."""
        self._num_checked += 1
        self._num_wrong += is_wrong
        self._hear(certificate, is_wrong=is_wrong)

    def went_through(self, certificate: Certificate | None) -> None:
        """A token of the sample was the final exit's own."""
        self._hear(certificate, is_wrong=False)

    def report(self) -> ShadowReport:
        broken = tuple((certificate, alarm.is_ringing) for certificate, alarm in self._alarms.items())
        return ShadowReport(self._num_checked, self._num_wrong, broken)

    def _hear(self, certificate: Certificate | None, *, is_wrong: bool) -> None:
        """NOTE of the metrics only disagreement can be seen token by token."""
        if certificate is None or certificate.metric != "disagreement":
            return
        alarm = self._alarms.setdefault(certificate, Alarm(certificate.risk, certificate.confidence))
        was_ringing = alarm.is_ringing
        alarm.hear(is_wrong)
        if alarm.is_ringing and not was_ringing:
            log.warning(
                "the certificate of disagreement %g doesn't hold for what is served: calibrate on such text, or turn "
                "exits off (%d of %d tokens checked were wrong)",
                certificate.risk,
                self._num_wrong,
                self._num_checked,
            )
