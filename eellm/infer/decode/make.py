"""From a request to the method that serves it."""

from eellm.infer.decode.base import Decode
from eellm.infer.decode.drafting import Drafting
from eellm.infer.decode.early import Early
from eellm.infer.decode.speculative import Speculative
from eellm.infer.request import Request


def make_decode(request: Request) -> Decode:
    options = request.options
    if options.method == "speculative":
        drafting = Drafting(request.tokens, max_draft=options.max_draft, lookup=options.lookup)
        return Speculative(request.thresholds, drafting, max_deferred=options.max_deferred, typical=options.typical)
    return Early(request.thresholds, max_deferred=options.max_deferred)
