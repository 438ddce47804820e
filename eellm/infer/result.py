"""What comes out of generation: tokens as they are made, what they cost, and the whole."""

from dataclasses import dataclass, field

from eellm.infer.shadow import ShadowReport


@dataclass(frozen=True, kw_only=True)
class Token:
    """One new token."""

    id: int
    text: str
    """What became certain of the text with this token; pieces joined are the whole text. Empty without tokenizer."""
    exit: int
    """The layer whose exit it was drawn from; L for the final one. Under `speculative`, the exit that drafted it."""
    confidence: float
    """The policy's score of the logits it was drawn from (under `gate`: the gate's, and 1 at the final exit)."""
    logprob: float
    """Log-probability under the raw logits that it was drawn from; under `speculative` the final exit's."""
    top: tuple[tuple[int, float], ...] = ()
    """As many of the likeliest tokens as `top_logprobs` asks for, each with its log-probability, likeliest first."""
    passed: tuple[tuple[int, float], ...] = ()
    """Exits that were asked about it before and weren't sure enough: layer and score, in order; not, under
    `speculative`, those asked about drafts."""


@dataclass(frozen=True, kw_only=True)
class Stats:
    """What a generation cost."""

    prompt_tokens: int
    new_tokens: int
    prefill_s: float
    """From the request's admission to its first new token."""
    decode_s: float
    """Time from the first to the last new token."""
    tokens_per_s: float
    """New tokens after the first over `decode_s`; of a single token, 1 / prefill_s."""
    mean_exit_layer: float
    layers_run: int
    """Passes through a layer, of any number of rows: what decoding pays for where reading weights is the bound. A pass
    shared with other requests counts for each of them."""
    layers_full: int
    """What full depth would have run: L for each new token."""
    deep_passes: int
    """Passes that reached the last layer."""
    heads_run: dict[int, int]
    """Output matrix runs by exit layer."""
    drafted: int = 0
    """Tokens proposed under `speculative`; of those `accepted` were right."""
    accepted: int = 0


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One prompt's continuation. The lists have one value per new token; a final end-of-text token is among them."""

    text: str | None
    """Without special tokens, cut at the stop string; None for models without tokenizer."""
    tokens: list[int]
    exits: list[int]
    confidences: list[float]
    logprobs: list[float]
    pieces: list[str]
    """The text that became certain with each token."""
    finish_reason: str
    """`eos`, `stop` (a stop string), `length` (max_new_tokens or the model's context), `cancelled`,
    `interrupted` (by Ctrl-C or an error, within a pass of the engine), or `failed` (see `Handle.failure`)."""
    stats: Stats


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """What an engine has done and holds."""

    num_running: int
    num_waiting: int
    num_free_slots: int
    num_ticks: int
    num_finished: int
    new_tokens: int
    reused_tokens: int
    """Of prompts: rows that were in memory already."""
    memory_bytes: int
    """Keys and values."""
    weight_bytes: int
    """The matrices, as they are multiplied with."""
    shadow: ShadowReport
    """What became of the tokens that were checked."""


@dataclass
class Work:
    """What was run for a request: one pass of any number of rows through a layer or an output matrix counts one."""

    layers: int = 0
    deep_passes: int = 0
    """Passes that reached the last layer."""
    heads: dict[int, int] = field(default_factory=dict)
    """Output matrix runs by exit layer."""
    drafted: int = 0
    accepted: int = 0

    def count_head(self, layer: int) -> None:
        self.heads[layer] = self.heads.get(layer, 0) + 1
