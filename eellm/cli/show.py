"""Tokens in the terminal, coloured by the layer they left at, with the layer told in words too."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.style import Style
from rich.text import Text

from eellm.exits.palette import colour

if TYPE_CHECKING:
    from eellm.infer.result import Stats


def show_token(console: Console, text: str, layer: int, num_layers: int) -> None:
    """One token's text, as it comes, in the colour of the layer that it left at."""
    if not console.is_terminal:  # data, which rich would change: it expands tabs and drops control characters
        print(text, end="", file=console.file, flush=True)
        return
    name = colour(layer, num_layers)
    style = Style() if name is None else Style(color=name, underline=True)
    console.print(Text(text, style), end="", soft_wrap=True, highlight=False)


def legend(exits: Sequence[int], num_layers: int) -> Text:
    """`exit 10: 12 tokens · exit 20: 5 tokens · final (30): 47 tokens`, each in its colour."""
    parts = []
    for layer, count in sorted(Counter(exits).items()):
        name = f"final ({layer})" if layer == num_layers else f"exit {layer}"
        tokens = "token" if count == 1 else "tokens"
        parts.append(Text(f"{name}: {count} {tokens}", colour(layer, num_layers) or ""))
    return Text(" · ").join(parts)


def summary(stats: "Stats") -> str:
    """One line: how deep, how much was saved, how fast."""
    saved = 1 - stats.layers_run / stats.layers_full
    return (
        f"{stats.new_tokens} tokens, mean exit layer {stats.mean_exit_layer:.1f}, {stats.layers_run} of "
        f"{stats.layers_full} layer passes run ({saved:.0%} saved), {stats.tokens_per_s:.1f} tokens/s"
    )
