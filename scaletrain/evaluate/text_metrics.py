"""What a generated text is worth beside the one that was asked for: each figure is in [0, 1], 1 for equal texts."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

_WORD = re.compile(r"[^\W_]+")
_ARTICLE = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(found: str, wanted: str) -> dict[str, float]:
    """Say whether two texts are equal, but for blanks."""
    return {"exact_match": float(found.split() == wanted.split())}


def token_f1(found: str, wanted: str) -> dict[str, float]:
    """Return F1 over words (Rajpurkar et al., 2016, SQuAD): without case, punctuation and English articles."""
    a, b = (_ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split() for text in (found, wanted))
    if not (a and b):
        return {"f1": float(a == b)}
    return {"f1": _f1((Counter(a) & Counter(b)).total(), len(a), len(b))}


def rouge(found: str, wanted: str) -> dict[str, float]:
    """Return the F1 of ROUGE-1, ROUGE-2 and ROUGE-L (Lin, 2004), without stemming.

    Words are runs of letters and digits, of any script, in lower case.
    """
    a, b = (_WORD.findall(text.lower()) for text in (found, wanted))
    out = {}
    for n in (1, 2):
        grams = [Counter(zip(*(words[i:] for i in range(n)), strict=False)) for words in (a, b)]
        out[f"rouge{n}"] = _f1((grams[0] & grams[1]).total(), grams[0].total(), grams[1].total())
    return out | {"rougeL": _f1(_longest_common_subsequence(a, b), len(a), len(b))}


METRICS: dict[str, Callable[[str, str], dict[str, float]]] = {
    "exact_match": exact_match,
    "f1": token_f1,
    "rouge": rouge,
}


def _f1(common: int, found: int, wanted: int) -> float:
    """Return 2PR / (P + R), where P = common / found and R = common / wanted; 0 where nothing is common."""
    return 2 * common / (found + wanted) if common else 0.0


def _longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Return its length, a whole column of the table at a time as the bits of one number (Hyyrö, 2004)."""
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    every = free = (1 << len(a)) - 1
    for word in b:
        met = free & places.get(word, 0)
        free = ((free + met) | (free - met)) & every
    return len(a) - bin(free).count("1")
