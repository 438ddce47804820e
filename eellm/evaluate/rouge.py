"""ROUGE-L of two texts: the F-measure of their longest common subsequence of words. No torch.

Words are runs of letters and digits, in lower case, without stemming. (Lin 2004.)
"""

import re

WORD = re.compile(r"[^\W_]+")


def rouge_l(text: str, reference: str) -> float:
    """From 0, no word in common, to 1, the same words in the same order. Two texts without any words are the same."""
    words, wanted = (WORD.findall(each.lower()) for each in (text, reference))
    if not words and not wanted:
        return 1.0
    return 2 * _common(words, wanted) / (len(words) + len(wanted))


def _common(first: list[str], second: list[str]) -> int:
    """Length of the longest common subsequence."""
    lengths = [0] * (len(second) + 1)  # of what was read of `first`, with each beginning of `second`
    for word in first:
        before = 0
        for j, other in enumerate(second, start=1):
            before, lengths[j] = lengths[j], before + 1 if word == other else max(lengths[j], lengths[j - 1])
    return lengths[-1]
