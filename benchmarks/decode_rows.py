"""The comparisons that `decode.py` makes: which decoders, on what, and the ratio that is wanted.

`rows_of_any` are those of a model that was trained without exits, `rows_with_exits` those of one that has them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from decode_rules import Bound, Study, spread
from decode_turns import Measure, Side
from peers import Peer

import eellm

PROMPT_TOKENS = 32
UNTUNED_EXITS = (10, 20)
SPECULATIVE = tuple({"method": "speculative", "threshold": tau} for tau in (0.8, 0.5, 0.3))
ENVIRONMENTS = {
    "transformers": "transformers",
    "economize": "transformers",
    "llama.cpp": "xllamacpp",
    "ctranslate2": "ctranslate2",
}
"""Where each decoder lives (`peers.py`)."""
LOOKUPS = tuple({"prompt_lookup": num} for num in (3, 10))
"""Ways in which transformers may look up what followed the same words before."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison."""

    name: str
    model: "Model"
    """Whose text the prompts are from."""
    ours: Side
    theirs: Side
    goal: float | None = None
    """The least ratio wanted, where one is."""
    batch: int = 1
    groups: int = 1
    """Batches in a turn, one after the other."""
    measure: Measure = "seconds"
    same_tokens: bool = False
    """Whether both sides must give the same."""
    bound: Bound | None = None
    """What our exit rules must keep; they are chosen so, and make the ways of our side."""


class Model:
    """A model directory with the text that prompts are cut from, read when they are needed."""

    def __init__(self, path: str, text: Path | None) -> None:
        self.path, self.text = path, text
        self.name = Path(path).name

    @property
    def missing(self) -> str | None:
        """What isn't there, if anything."""
        if not Path(self.path).is_dir():
            return f"{self.path}: no such directory (`make quickstart` makes SmolLM2's)"
        if self.text is not None and not self.text.is_file():
            return f"{self.text}: no such file; `make english` fetches it"
        return None

    @property
    def exit_layers(self) -> list[int]:
        file = Path(self.path) / "exits.json"
        return [exit["layer"] for exit in json.loads(file.read_text())["exits"]] if file.is_file() else []

    @cached_property
    def study(self) -> Study:
        assert self.text is not None
        return Study(eellm.load(self.path), self.text)

    @cached_property
    def _prompt_tokens(self) -> list[int]:
        if self.text is not None:
            return self.study.prompt_tokens
        tokenizer = eellm.load(self.path).tokenizer
        assert tokenizer is not None, f"{self.path} has no tokenizer"
        return tokenizer.encode("\n".join(text for _, text in sorted(topics.items())))

    def rounds(self, num_rounds: int, num_prompts: int) -> list[list[list[int]]]:
        """Prompts of one round more, all different."""
        prompts = spread(self._prompt_tokens, num_prompts=(num_rounds + 1) * num_prompts, num_tokens=PROMPT_TOKENS)
        return [prompts[i :: num_rounds + 1] for i in range(num_rounds + 1)]


@dataclass(frozen=True, kw_only=True)
class Decoders:
    """Sides of one model."""

    path: str
    threads: int
    peers: Mapping[str, Peer]
    """Environments by name."""

    def ours(self, *ways: dict[str, Any], threads: int | None = None, **options: Any) -> Side:
        loaded = {"model": self.path, "threads": threads or self.threads} | options
        return Side(decoder="eellm", options=loaded, ways=ways or ({"method": "full"},))

    def peer(self, decoder: str, *ways: dict[str, Any], model: str | None = None, **options: Any) -> Side:
        loaded = {"model": model or self.path, "threads": self.threads} | options
        peer = self.peers.get(ENVIRONMENTS[decoder]) or Peer(
            name=decoder, missing="`python benchmarks/peers.py` makes its place"
        )
        python, missing = peer.python or "", peer.missing
        return Side(decoder=decoder, python=python, missing=missing, options=loaded, ways=ways or ({},))

    def memory(self) -> Side:
        return Side(decoder="memory", options={"model": self.path, "threads": self.threads})


def rows_of_any(model: Model, make: Decoders, gguf: str) -> list[Row]:
    """Of a model that was trained without exits."""
    full, transformers = make.ours(), make.peer("transformers")
    int8, int4 = make.ours(quantize="int8"), make.ours(quantize="int4")
    untuned = {"untuned_exits": list(UNTUNED_EXITS)}
    singles = make.ours({"method": "full"}, *SPECULATIVE, **untuned)
    auto = make.ours({"method": "auto"}, **untuned)
    fp32 = Row(name="fp32", model=model, ours=full, theirs=transformers, goal=1.5, same_tokens=True)
    return [
        fp32,
        replace(fp32, name="fp32-batch-8", batch=8),
        Row(name="fp32-limit", model=model, ours=full, theirs=make.memory(), goal=0.85, measure="decode_s"),
        Row(name="int8", model=model, ours=int8, theirs=transformers, goal=2.7),
        Row(name="int4", model=model, ours=int4, theirs=transformers, goal=3.2),
        Row(name="llama.cpp", model=model, ours=int4, theirs=make.peer("llama.cpp", model=gguf), goal=1.0),
        Row(name="ctranslate2", model=model, ours=full, theirs=make.peer("ctranslate2", compute_type="float32")),
        Row(name="ctranslate2-int8", model=model, ours=int8, theirs=make.peer("ctranslate2", compute_type="int8")),
        Row(name="auto-untuned", model=model, ours=auto, theirs=singles, goal=0.97, same_tokens=True),
    ]


def rows_with_exits(model: Model, make: Decoders) -> list[Row]:
    """Of a model that was trained with exits. It is small: a turn takes several prompts."""
    full, early = make.ours(), make.ours({"method": "early"})
    speculative = make.ours(*SPECULATIVE)
    pipelined = make.ours({"method": "pipelined"}, threads=1, workers=2)
    auto, singles = make.ours({"method": "auto"}), make.ours({"method": "full"}, *SPECULATIVE)
    drafts = drafting(model.exit_layers)

    def row(name: str, ours: Side, theirs: Side, goal: float, **others: Any) -> Row:
        return Row(name=f"{model.name}:{name}", model=model, ours=ours, theirs=theirs, goal=goal, groups=6, **others)

    return [
        row("early-agreement", early, full, 1.6, bound="agreement"),
        row("early-bits", early, full, 1.3, bound="bits"),
        row("speculative", speculative, full, 1.3, same_tokens=True),
        row("pipelined", pipelined, make.ours(threads=1), 1.6, bound="agreement"),
        row("transformers", speculative, make.peer("transformers", *drafts, *LOOKUPS), 1.5, same_tokens=True),
        row("economize", speculative, make.peer("economize", *drafts), 1.5, same_tokens=True),
        row("auto", auto, singles, 0.97, same_tokens=True),
    ]


def drafting(exit_layers: Sequence[int]) -> list[dict[str, Any]]:
    """Ways in which a peer may draft at the exits: as many tokens at most, and while it is as sure as that."""
    lengths = ((2, 0.0), (4, 0.0), (20, 0.4))  # the last one is transformers' own choice
    return [
        {"exit": layer, "num_drafts": num, "confidence": sure, "exit_norms": own}
        for layer in exit_layers
        for num, sure in lengths
        for own in (False, True)
    ]
