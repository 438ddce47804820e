"""From a request to the method that serves it, with what the engine's other requests have found out."""

from collections.abc import Callable

from eellm.infer.costs import StepCosts
from eellm.infer.decode.base import Decode
from eellm.infer.decode.drafting import Drafters, Drafting
from eellm.infer.decode.early import Early
from eellm.infer.decode.guarded import ExitShares, GuardedEarly
from eellm.infer.decode.speculative import Speculative
from eellm.infer.lookup import Recall
from eellm.infer.request import Request
from eellm.infer.shadow import Shadow


class Methods:
    """An engine's methods. Costs are asked for when the first request needs them."""

    def __init__(self, costs: Callable[[], StepCosts], recall: Recall, shadow: Shadow | None = None) -> None:
        self._costs = costs
        self._recall = recall
        self._shadow = shadow
        self._drafters: Drafters | None = None
        self._shares: dict[object, ExitShares] = {}

    def serve(self, request: Request) -> Decode:
        """`auto` is speculation, which loses nothing, or with a threshold or a risk early exit; both as far as they
        pay."""
        options = request.options
        if options.method == "speculative" or (options.method == "auto" and not options.exits_answer):
            if self._drafters is None:
                self._drafters = Drafters(self._costs(), self._recall)
            drafting = Drafting(
                self._drafters,
                request.tokens,
                max_draft=options.max_draft,
                lookup=options.lookup,
                is_guarded=options.method == "auto" or not options.always_draft,
            )
            return Speculative(request.thresholds, drafting, max_deferred=options.max_deferred, typical=options.typical)
        if options.method == "auto" and request.thresholds:
            shares = self._shares_of(request)
            return GuardedEarly(request.thresholds, shares, max_deferred=options.max_deferred, shadow=self._shadow)
        return Early(request.thresholds, max_deferred=options.max_deferred, shadow=self._shadow)

    def running(self, num_sequences: int) -> None:
        """So many sequences share the passes from now on."""
        for known in (self._drafters, *self._shares.values()):
            if known is not None:
                known.batch_size = max(1, num_sequences)

    def _shares_of(self, request: Request) -> ExitShares:
        max_deferred, whole = request.options.max_deferred, request.certificate is not None
        key = (tuple(request.thresholds.items()), request.policy, max_deferred, whole)
        if key not in self._shares:
            gated = request.policy == "gate"
            self._shares[key] = ExitShares(self._costs(), request.thresholds, max_deferred, gated=gated, whole=whole)
        return self._shares[key]
