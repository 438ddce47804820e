"""How well a generated answer matches those of people. Without torch; lm-eval calls it, by what the task files say.

SQuAD's two measures (arXiv 1606.05250 §6.1) take the best match among several answers, without case, punctuation and
articles. ROUGE-L (Lin 2004) is the F1 of the longest common subsequence of stems.
"""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

ARTICLES = re.compile(r"\b(?:a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def squad(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """F1 and exact match of the answer to one question of SQuAD."""
    (answer,) = results
    return {
        "f1": max(token_f1(answer, right) for right in doc["answers"]),
        "exact_match": max(float(words(answer) == words(right)) for right in doc["answers"]),
    }


def xsum(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """ROUGE-L of one summary."""
    (summary,) = results
    return {"rouge_l": _scorer().score(doc["summary"], summary)["rougeL"].fmeasure}


def token_f1(answer: str, right: str) -> float:
    """F1 over words, each as often as it stands there."""
    said, wanted = words(answer), words(right)
    if not said or not wanted:
        return float(said == wanted)
    common = (Counter(said) & Counter(wanted)).total()
    return 2 * common / (len(said) + len(wanted))


def words(text: str) -> list[str]:
    """What is compared."""
    return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # lm-eval brings it

    return RougeScorer(["rougeL"], use_stemmer=True)
