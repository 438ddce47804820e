"""What goes from stage to stage with the rows of a pass, and what comes back to the engine.

A pass is a list of entries, each some neighbouring rows of one sequence. Its newest row may still want a token: every
stage tests its exits on it until one is sure. The last stage reads what the final exit must say, and tells that the
entry has been through.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from eellm.exits.policy import SCORES

POLICIES = (*SCORES, "gate")
NEVER = 1.0
"""A threshold that no score reaches."""
FIXED = 9

# kinds of messages
PASS = 1
COPY = 2
"""The first rows of one slot into another: source, target, number of rows."""
RESERVE = 3
"""Room for so many slots of so many rows."""
PROBE = 4
"""Whoever gets it says so; its values come back."""
STOP = 5
REPLY = 6
"""Records."""
WIPE = 7
"""Zeros in all rows of a slot."""
# kinds of records, in a reply
ANSWER = 1
"""An exit is sure of an entry's newest row."""
READING = 2
"""What the final exit says of a row."""
END = 3
"""The entry has been through all stages."""
RECORD = 7
"""Numbers of a record, in front of those of each exit."""
UNASKED = -1.0
"""In the place of an exit's score."""


@dataclass(kw_only=True, slots=True)
class Entry:
    ticket: int
    """The engine's number for it."""
    slot: int
    before: int
    """The sequence's rows that have passed already."""
    count: int
    policy: str
    num_readings: int
    """Newest rows that the final exit must read..."""
    is_judged: bool
    """... even if an exit answers."""
    wants_logits: bool
    """Whether whoever draws tokens needs more than the likeliest one."""
    answered: int = 0
    """The layer of the exit that was sure of the newest row; 0: none yet."""
    exits: dict[int, float] = field(default_factory=dict)
    """By layer, those in use on the stages to come, with the score at which each is sure; `NEVER` where it isn't to
    be tested."""
    heads_run: set[int] = field(default_factory=set)
    """Layers of the exits that were read."""
    unsure: dict[int, float] = field(default_factory=dict)
    """By layer, the scores of those that were asked in vain."""

    def is_tested(self, layer: int) -> bool:
        return self.answered == 0 and self.exits.get(layer, NEVER) < NEVER

    @property
    def num_final(self) -> int:
        """Rows that the final exit reads after all."""
        return self.num_readings if self.is_judged or not self.answered else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    kind: int
    ticket: int
    layer: int
    """Of the exit; of `END`, of the one on a later stage that answered, or 0."""
    heads: int = 0
    """Of `ANSWER` and `END`, the exits of later stages that were read so far, as `EntryCode.mask` writes them."""
    token: int = 0
    logprob: float = 0.0
    score: float = 0.0
    unsure: Mapping[int, float] = field(default_factory=dict)
    """As of an `Entry`; of `ANSWER` and `END`."""


class EntryCode:
    """Entries and records as rows of numbers."""

    def __init__(self, exit_layers: Sequence[int]) -> None:
        """exit_layers: the model's."""
        self.exit_layers = tuple(exit_layers)
        self.width = FIXED + 2 * len(self.exit_layers)
        self.record_width = RECORD + len(self.exit_layers)

    def encode(self, entries: Iterable[Entry]) -> list[float]:
        values: list[float] = []
        for e in entries:
            values += (e.ticket, e.slot, e.before, e.count, POLICIES.index(e.policy), e.num_readings)
            values += (e.is_judged + 2 * e.wants_logits, e.answered, self.mask(e.heads_run))
            values += (e.exits.get(layer, -1.0) for layer in self.exit_layers)
            values += self._scores(e.unsure)
        return values

    def decode(self, values: Sequence[float]) -> list[Entry]:
        return [self._entry(values[i : i + self.width]) for i in range(0, len(values), self.width)]

    def _entry(self, values: Sequence[float]) -> Entry:
        ticket, slot, before, count, policy, num_readings, flags, answered, heads = map(int, values[:FIXED])
        thresholds = zip(self.exit_layers, values[FIXED : FIXED + len(self.exit_layers)], strict=True)
        return Entry(
            ticket=ticket,
            slot=slot,
            before=before,
            count=count,
            policy=POLICIES[policy],
            num_readings=num_readings,
            is_judged=bool(flags & 1),
            wants_logits=bool(flags & 2),
            answered=answered,
            exits={layer: threshold for layer, threshold in thresholds if threshold >= 0},
            heads_run=self.heads(heads),
            unsure=self._unsure(values[FIXED + len(self.exit_layers) :]),
        )

    def encode_records(self, records: Iterable[Record]) -> list[float]:
        values: list[float] = []
        for r in records:
            values += (r.kind, r.ticket, r.layer, r.heads, r.token, r.logprob, r.score, *self._scores(r.unsure))
        return values

    def decode_records(self, values: Sequence[float]) -> Iterator[Record]:
        for i in range(0, len(values), self.record_width):
            kind, ticket, layer, heads, token = map(int, values[i : i + 5])
            logprob, score = values[i + 5 : i + RECORD]
            unsure = self._unsure(values[i + RECORD : i + self.record_width])
            yield Record(
                kind=kind,
                ticket=ticket,
                layer=layer,
                heads=heads,
                token=token,
                logprob=logprob,
                score=score,
                unsure=unsure,
            )

    def _scores(self, unsure: Mapping[int, float]) -> Iterator[float]:
        return (unsure.get(layer, UNASKED) for layer in self.exit_layers)

    def _unsure(self, scores: Sequence[float]) -> dict[int, float]:
        return {layer: score for layer, score in zip(self.exit_layers, scores, strict=True) if score != UNASKED}

    def mask(self, layers: Iterable[int]) -> int:
        """Exits as one number, exact in float64 for up to 53 of them."""
        return sum(1 << self.exit_layers.index(layer) for layer in layers)

    def heads(self, mask: int) -> set[int]:
        return {layer for i, layer in enumerate(self.exit_layers) if mask >> i & 1}
