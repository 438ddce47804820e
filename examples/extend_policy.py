"""An exit policy in one file: how much likelier the first choice is than the second, as a share.

    raw logits of an exit → a score in [0, 1], larger is surer → compared with the threshold

Scored by a method of one's own, so that no file of the package changes. To give it a name that every command knows, two
do: the function and its row in SCORES (`eellm/exits/policy.py`), and the word in PolicyName (`eellm/config/infer.py`).
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

import eellm
from eellm.infer.decode.base import Decode
from eellm.infer.decode.early import Early
from eellm.infer.decode.make import Methods
from eellm.infer.readout import Reading
from eellm.infer.request import Request
from eellm.infer.sequence import Sequence as Served


def lead(logits_V: Tensor) -> Tensor:
    """One minus the second largest probability over the largest: 0 is a tie. (..., V) → (...)."""
    top_2 = logits_V.float().topk(2, dim=-1).values
    return 1 - (top_2[..., 1] - top_2[..., 0]).exp()


class Scored(Early):
    """As `early`, by a score of one's own."""

    def __init__(
        self, thresholds: Mapping[int, float], score: Callable[[Tensor], Tensor], *, max_deferred: int
    ) -> None:
        super().__init__(dict.fromkeys(thresholds, 0.0), max_deferred=max_deferred)  # every exit is asked
        self.needed, self.score = thresholds, score

    def at_exit(self, seq: Served, reading: Reading) -> bool:
        if float(self.score(reading.logits_V)) < self.needed[reading.layer]:
            return False  # the row goes on
        return super().at_exit(seq, reading)


class WithScore:
    """An engine's methods, with a score of one's own where `early` is asked for."""

    def __init__(self, methods: Methods, score: Callable[[Tensor], Tensor]) -> None:
        self.methods, self.score = methods, score

    def serve(self, request: Request) -> Decode:
        if request.options.method != "early":
            return self.methods.serve(request)
        return Scored(request.thresholds, self.score, max_deferred=request.options.max_deferred)

    def running(self, num_sequences: int) -> None:
        self.methods.running(num_sequences)


@torch.inference_mode()
def precision(model: eellm.EarlyExitLM, tokens: list[int], threshold: float) -> dict[int, tuple[float, float]]:
    """For each exit: the share of rows that it is sure of, and how many of those agree with the final exit."""
    logits = model(torch.tensor([tokens]))
    final = logits[model.config.num_layers].argmax(-1)
    found = {}
    for layer in model.config.exit_layers:
        sure = lead(logits[layer]) >= threshold
        agrees = (logits[layer].argmax(-1) == final)[sure].float()
        found[layer] = float(sure.float().mean()), float(agrees.mean()) if len(agrees) else 1.0
    return found


def main() -> None:
    model = eellm.load("models/english-bytes")
    tokens = model.tokenizer.encode("The people of the United States have a government of their own.")
    for layer, (share, right) in precision(model, list(tokens), 0.9).items():
        print(f"exit {layer}: sure of {share:.0%} of the rows, right in {right:.0%} of those")
    with eellm.Engine(model) as engine:
        engine.methods = WithScore(engine.methods, lead)
        (out,) = engine.generate(["The Congress of the "], method="early", threshold=0.9, max_new_tokens=48)
        print(f"{out.text!r}, mean exit layer {out.stats.mean_exit_layer:.1f}")


if __name__ == "__main__":
    main()
