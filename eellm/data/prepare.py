"""`eellm prepare`: text in many forms → a directory of token shards, which training maps into memory.

    inputs → documents (inputs.py) → tokens, by several processes (encode.py) → files (shards.py)

The same inputs and tokenizer give the same bytes, whatever the number of processes; where they did already, nothing is
done again but checking the sums of what is there.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from eellm.data.documents import naming
from eellm.data.encode import cut_text, encode_all, make_chunks
from eellm.data.inputs import find_inputs, fingerprint, read_inputs, size_of
from eellm.data.shards import Shards, check_free, is_prepared, writing
from eellm.errors import DataError
from eellm.log import log
from eellm.text.bytes import train_bpe
from eellm.text.tokenizer import Tokenizer, check_well_formed

_TRAINING_LETTERS = 1 << 16
"""Of a text that the tokenizer's trainer gets at once; it holds a few hundred of them."""


def prepare(inputs: Sequence[str], out: Path, *, tokenizer: Tokenizer | int, num_workers: int = 1) -> Shards:
    """Writes the prepared directory `out`, which is opened.

    inputs: see inputs.py. tokenizer: a model's, or the size of a vocabulary to learn from the inputs. Raises DataError
    for what is wrong with an input, or where `out` holds other files; ConfigError for a vocabulary that is too small.
    """
    check_free(out)
    found = find_inputs(inputs)
    recipe = _recipe(found, tokenizer)
    if recipe is not None and _is_whole(out, recipe):
        log.info(f"{out}: is there already, made from the same inputs")
        return Shards(out)
    if isinstance(tokenizer, int):
        tokenizer = _train(found, tokenizer)
    with _progress("tokens", size_of(found)) as advance, writing(out, tokenizer, recipe=recipe) as writer:
        chunks = make_chunks(read_inputs(found, advance), tokenizer)
        for encoded in encode_all(chunks, tokenizer, num_workers=num_workers):
            writer.add(encoded.tokens, encoded.is_target, encoded.ends)
    return Shards(out)


def _recipe(inputs: Sequence[str], tokenizer: Tokenizer | int) -> str | None:
    """What the tokens depend on; None where that isn't known beforehand."""
    contents = fingerprint(inputs)
    if contents is None:
        return None
    maker = f"bpe {tokenizer}" if isinstance(tokenizer, int) else f"{tokenizer.fingerprint} {tokenizer.chat_template}"
    return hashlib.sha256(f"{contents} {maker}".encode()).hexdigest()


def _is_whole(out: Path, recipe: str) -> bool:
    if not is_prepared(out):
        return False
    try:
        shards = Shards(out)
        if shards.recipe != recipe:
            return False
        shards.verify()
    except DataError as error:
        log.warning(f"{error.args[0].partition(';')[0]}: making it anew")
        return False
    return True


def _train(inputs: Sequence[str], vocab_size: int) -> Tokenizer:
    with _progress("tokenizer", size_of(inputs)) as advance:
        return train_bpe(_training_texts(inputs, advance), vocab_size)


def _training_texts(inputs: Sequence[str], advance: Callable[[int], object]) -> Iterator[str]:
    for document in read_inputs(inputs, advance):
        if document.messages is not None:
            raise DataError(
                f"{document.where}: a chat needs a model's tokenizer, which has a chat template; give --tokenizer"
            )
        for text in cut_text(document.text, _TRAINING_LETTERS, lambda left, right: True):
            with naming(document.where):
                check_well_formed(text)
            yield text


@contextmanager
def _progress(what: str, num_bytes: int | None) -> Iterator[Callable[[int], object]]:
    """A bar on a terminal; gives what to tell of bytes read."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=num_bytes)
        yield lambda num: progress.advance(task, num)
