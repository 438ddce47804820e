"""A decoding method in one file: patience. A token leaves where two exits in a row choose the same one.

    Engine.methods → a method for each request → asked at exits and at the end, by the loop that all methods share

No score, no threshold: agreement with the exit before is what counts (PABEE, arXiv 2006.04152). Deferred rows, true
keys and values, batches, streaming and sampling are the engine's, and stay as they are.
"""

from collections.abc import Sequence

import eellm
from eellm.infer.decode.base import Decode
from eellm.infer.decode.early import Early
from eellm.infer.decode.make import Methods
from eellm.infer.readout import Reading
from eellm.infer.request import Request
from eellm.infer.sequence import Sequence as Served


class Patient(Early):
    """As `early`; an exit is sure if it chooses what the exit before it chose."""

    def __init__(self, layers: Sequence[int], *, max_deferred: int) -> None:
        super().__init__(dict.fromkeys(layers, 0.0), max_deferred=max_deferred)  # every exit is asked
        self.before: int | None = None

    def at_exit(self, seq: Served, reading: Reading) -> bool:
        if reading.token != self.before:
            self.before = reading.token
            return False  # the row goes on
        return super().at_exit(seq, reading)

    def answer(self, seq: Served, reading: Reading) -> None:
        self.before = None
        super().answer(seq, reading)


class WithPatience:
    """An engine's methods, with patience where `early` is asked for."""

    def __init__(self, methods: Methods) -> None:
        self.methods = methods

    def serve(self, request: Request) -> Decode:
        if request.options.method != "early":
            return self.methods.serve(request)
        return Patient(tuple(request.thresholds), max_deferred=request.options.max_deferred)

    def running(self, num_sequences: int) -> None:
        self.methods.running(num_sequences)


def main() -> None:
    with eellm.Engine("models/english-bytes") as engine:
        engine.methods = WithPatience(engine.methods)
        for method in ("full", "early"):
            (out,) = engine.generate(["The Congress of the United States "], method=method, max_new_tokens=48)
            print(f"{method}: {out.text!r}, mean exit layer {out.stats.mean_exit_layer:.1f}")


if __name__ == "__main__":
    main()
