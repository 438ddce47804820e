"""One colour per depth, wherever exits are shown: terminal, report."""

PALETTE = ("#009e73", "#56b4e9", "#0072b2", "#cc79a7", "#e69f00", "#d55e00")
"""From early to late: distinguishable with the common colour blindnesses (Okabe and Ito's palette)."""


def colour(layer: int, num_layers: int) -> str | None:
    """The colour of an exit layer; None (that of plain text) for the final one."""
    if layer >= num_layers:
        return None
    return PALETTE[(layer - 1) * len(PALETTE) // max(num_layers - 1, 1)]
