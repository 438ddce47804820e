"""The tokenizer inside a GGUF file → tokenizer.json and tokenizer_config.json.

In: the file's metadata, plain Python values. Out: the two files' bytes, or none, with a warning, for a tokenizer that
we can't convert: weights are of use without one, wrong token ids are not.

GGUF knows two kinds that matter here. `gpt2` is byte-level BPE: tokens and merges are stored, but of the way in which
text is cut into words there is only a name (`pre`), so the expressions are ours to know. `llama` is SentencePiece's
BPE: no merges, but a score for each piece; of all neighbours whose union is a piece, those with the best one join
first. So every way to cut a piece in two is a merge, ranked by the piece's score.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.decoders import Decoder
from tokenizers.models import BPE
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer

from eellm.errors import CheckpointError, UnsupportedError
from eellm.log import log

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # token types; further ones are never matched as a whole

# \p{N} is where the two differ: Llama 3 takes up to three digits at once, Qwen one.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPECIAL_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_MODEL_TOKEN_IDS = {  # a chat ends its turn with another token than a text: end of text, of turn, of message
    "bos_token_id": ("bos_token_id",),
    "eos_token_id": ("eos_token_id", "eot_token_id", "eom_token_id"),
    "pad_token_id": ("padding_token_id",),
}


@dataclass(frozen=True, kw_only=True)
class _WordSplit:
    """What a name of `tokenizer.ggml.pre` stands for."""

    pre_tokenizer: PreTokenizer
    normalizer: Normalizer | None = None
    ignore_merges: bool = False
    """A word that is a token is taken as it is, whether or not merges lead to it."""
    add_bos: bool = False
    """Whether texts begin with bos where the file doesn't say."""


def _by_expression(numbers: str) -> PreTokenizer:
    split = pre_tokenizers.Split(Regex(_WORDS % numbers), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
_LLAMA3 = _WordSplit(pre_tokenizer=_by_expression(r"\p{N}{1,3}"), ignore_merges=True, add_bos=True)
_WORD_SPLITS = {
    "default": _WordSplit(pre_tokenizer=_GPT2),
    "gpt-2": _WordSplit(pre_tokenizer=_GPT2),
    "smollm": _WordSplit(pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2])),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _WordSplit(pre_tokenizer=_by_expression(r"\p{N}"), normalizer=normalizers.NFC()),
}


def convert_tokenizer(metadata: Mapping[str, Any], max_length: int) -> dict[str, bytes]:
    """Both files by name, as transformers reads them; none, and a warning, where the tokenizer is of another kind.

    Errors: CheckpointError if the tokenizer's metadata is incomplete or contradicts itself.
    """
    fields = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    kind = fields.get("model")
    try:
        if kind not in _KINDS:
            raise UnsupportedError(f"tokenizer.ggml.model = {kind!r}: must be one of {', '.join(_KINDS)}")
        tokenizer, begins_with_bos = _KINDS[kind](fields)
    except UnsupportedError as reason:
        log.warning("the GGUF file's tokenizer is left out, as it can't be converted: %s", reason)
        return {}
    _mark_special(tokenizer, fields)
    config: dict[str, Any] = {name: _token(fields, key) for name, key in _SPECIAL_TOKENS.items() if key in fields}
    config["add_bos_token"] = bool(fields.get("add_bos_token", begins_with_bos)) and "bos_token" in config
    config["add_eos_token"] = bool(fields.get("add_eos_token", False)) and "eos_token" in config
    _add_ends(tokenizer, config)
    if "tokenizer.chat_template" in fields:
        config["chat_template"] = fields["tokenizer.chat_template"]
    config |= {"model_max_length": max_length, "clean_up_tokenization_spaces": False}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # any other class would rebuild what tokenizer.json says
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False).encode(),
    }


def token_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """bos_token_id, eos_token_id (a list where several tokens end a text) and pad_token_id, as in config.json."""
    found: dict[str, Any] = {}
    for name, keys in _MODEL_TOKEN_IDS.items():
        ids = [metadata[f"tokenizer.ggml.{key}"] for key in keys if f"tokenizer.ggml.{key}" in metadata]
        if ids:
            found[name] = ids[0] if len(set(ids)) == 1 else list(dict.fromkeys(ids))
    return found


def _byte_level(fields: Mapping[str, Any]) -> tuple[Tokenizer, bool]:
    name = fields.get("pre", "default")
    if name not in _WORD_SPLITS:
        raise UnsupportedError(f"tokenizer.ggml.pre = {name!r}: must be one of {', '.join(_WORD_SPLITS)}")
    if name == "default":
        log.warning("the GGUF file doesn't say how its tokenizer cuts text into words: GPT-2's way is assumed")
    split = _WORD_SPLITS[name]
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in _required(fields, "merges"))]
    tokenizer = Tokenizer(_bpe(fields, merges, ignore_merges=split.ignore_merges))
    if split.normalizer is not None:
        tokenizer.normalizer = split.normalizer
    tokenizer.pre_tokenizer = split.pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, split.add_bos


def _sentencepiece(fields: Mapping[str, Any]) -> tuple[Tokenizer, bool]:
    """As in the tokenizer.json of Llama 2. Like llama.cpp it puts a space before the text after each special token."""
    unknown = _token({"unknown_token_id": 0, **fields}, "unknown_token_id")
    tokenizer = Tokenizer(_bpe(fields, _merges_by_score(fields), unk_token=unknown, fuse_unk=True, byte_fallback=True))
    to_bars: list[Normalizer] = [normalizers.Replace(" ", "▁")]
    to_text: list[Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if fields.get("add_space_prefix", True):
        to_bars.insert(0, normalizers.Prepend("▁"))
        to_text.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(to_bars)
    tokenizer.decoder = decoders.Sequence(to_text)
    return tokenizer, True


_KINDS: dict[Any, Callable[[Mapping[str, Any]], tuple[Tokenizer, bool]]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
}


def _merges_by_score(fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every way to make a piece of two, best piece first. Ties in the order of transformers' own conversion."""
    rows = zip(_required(fields, "tokens"), _required(fields, "scores"), _types(fields), strict=False)
    scores = {token: score for token, score, kind in rows if kind == _NORMAL}
    ranked = [
        (score, cut, piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    ranked.sort(key=lambda row: row[:2], reverse=True)
    return [(left, right) for _, _, left, right in ranked]


def _bpe(fields: Mapping[str, Any], merges: list[tuple[str, str]], **options: Any) -> BPE:
    vocabulary = {token: index for index, token in enumerate(_required(fields, "tokens"))}
    try:
        return BPE(vocabulary, merges, **options)
    except Exception as error:  # tokenizers has no narrower one
        raise CheckpointError(f"the tokenizer's merges don't fit its tokens: {error}") from None


def _mark_special(tokenizer: Tokenizer, fields: Mapping[str, Any]) -> None:
    """Control tokens are found in text before anything else, and left out of it; user-defined ones only found."""
    typed = list(zip(_required(fields, "tokens"), _types(fields), strict=False))
    special = [token for token, kind in typed if kind in (_UNKNOWN, _CONTROL)]
    defined = [token for token, kind in typed if kind == _USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in defined])


def _add_ends(tokenizer: Tokenizer, config: Mapping[str, Any]) -> None:
    """bos before and eos after each text, where the model was trained with them."""
    before = [config["bos_token"]] if config["add_bos_token"] else []
    after = [config["eos_token"]] if config["add_eos_token"] else []
    if before or after:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *(f"{part}:1" for part in (*before, "$B", *after))],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*before, *after}],
        )


def _types(fields: Mapping[str, Any]) -> list[int]:
    return fields.get("token_type") or [_NORMAL] * len(_required(fields, "tokens"))


def _token(fields: Mapping[str, Any], key: str) -> str:
    tokens, index = _required(fields, "tokens"), fields[key]
    if index >= len(tokens):
        raise CheckpointError(f"metadata tokenizer.ggml.{key} = {index}: there are {len(tokens)} tokens")
    return tokens[index]


def _required(fields: Mapping[str, Any], key: str) -> Any:
    if key not in fields:
        raise CheckpointError(f"metadata tokenizer.ggml.{key} is missing")
    return fields[key]
