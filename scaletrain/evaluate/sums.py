"""Metrics that follow from sums over a set, so that it may be cut into batches and over processes in any way.

Each comes as terms, whose sums the evaluation divides by one count, and as what turns the divided sums into the metric:
a ratio of two of them is the ratio of the sums.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from scaletrain.player import Term

Metrics = Mapping[str, float]

_HITS, _NAMED = "hits:", "named:"


def hits(predicted: Tensor, gold: Tensor) -> tuple[Tensor, Tensor]:
    """Return how often each class is rightly predicted, and how often it is predicted or is the truth: (C,), (C,).

    predicted, gold: (N, C) bool, whether a sample is of a class.
    """
    return (predicted & gold).sum(0), predicted.sum(0) + gold.sum(0)


def f1_terms(names: Sequence[str], right: Tensor, named: Tensor, per: str) -> dict[str, Term]:
    """Return what `f1` makes a score of, for each of some names. right, named: (C,), as `hits` returns them."""
    sums = {_HITS: right.unbind(), _NAMED: named.unbind()}
    return {
        kind + name: Term(s, per, 0.0) for kind, parts in sums.items() for name, s in zip(names, parts, strict=True)
    }


def f1(metrics: Metrics, micro: bool = False) -> dict[str, float]:
    """Put F1 = 2·TP / (2·TP + FP + FN) in the place of `f1_terms`: of each name, and `f1`, their mean (macro).

    A name that was neither predicted nor true has NaN, and no part in the mean. micro: add `f1_micro`, of all names
    taken together.
    """
    named = {key.removeprefix(_NAMED): value for key, value in metrics.items() if key.startswith(_NAMED)}
    right = {name: metrics[_HITS + name] for name in named}
    scores = {name: 2 * right[name] / total for name, total in named.items() if total}
    found = {key: value for key, value in metrics.items() if not key.startswith((_HITS, _NAMED))}
    found["f1"] = sum(scores.values()) / len(scores) if scores else 0.0
    if micro:
        found["f1_micro"] = 2 * sum(right.values()) / total if (total := sum(named.values())) else 0.0
    return found | {f"f1/{name}": scores.get(name, math.nan) for name in named}


def correlation_terms(x: Tensor, y: Tensor, per: str) -> dict[str, Term]:
    """Return what `pearson` makes a correlation of. x, y: (N,); summed in double precision."""
    x, y = x.double(), y.double()
    sums = {"x": x, "y": y, "xy": x * y, "xx": x * x, "yy": y * y}
    return {f"mean:{name}": Term(values.sum(), per, 0.0) for name, values in sums.items()}


def pearson(metrics: Metrics) -> dict[str, float]:
    """Put `pearson` in the place of `correlation_terms`; NaN where a variable does not vary."""
    found = {key: value for key, value in metrics.items() if not key.startswith("mean:")}
    x, y, xy, xx, yy = (metrics[f"mean:{name}"] for name in ("x", "y", "xy", "xx", "yy"))
    spread = max(xx - x * x, 0.0) * max(yy - y * y, 0.0)
    return found | {"pearson": (xy - x * y) / math.sqrt(spread) if spread else math.nan}


class Spans:
    """Spans that BIO tags name (Ramshaw & Marcus, 1995), as conlleval counts them.

    One begins at B-X, or at I-X that follows no tag of X, and ends before the next that begins, or at a tag of no X.
    """

    def __init__(self, names: Sequence[str]):
        """names: of the tags, by id: `O`, `B-X`, `I-X`. Raises ValueError when one is none of these."""
        for name in names:
            if name != "O" and not (name[:2] in ("B-", "I-") and name[2:]):
                raise ValueError(f"{name} is no BIO tag")
        self.kinds = tuple(dict.fromkeys(name[2:] for name in names if name != "O"))
        # 0 stands for no span, as does the tag of places that have none, the last.
        self._kind = torch.tensor([self.kinds.index(n[2:]) + 1 if n != "O" else 0 for n in names] + [0])
        self._begin = torch.tensor([n.startswith("B-") for n in names] + [False])

    def count(self, predicted: Tensor, gold: Tensor) -> tuple[Tensor, Tensor]:
        """Return how many spans of each kind are found, and how many are predicted or true: (K,), (K,).

        predicted, gold: (B, W) ids of tags, a sequence a row; -100 in gold where there is none.
        """
        none = len(self._kind) - 1
        (kind_p, first_p, last_p), (kind_g, first_g, last_g) = (
            self._found(tags.masked_fill(gold < 0, none)) for tags in (predicted, gold)
        )
        right = first_p & first_g & (kind_p == kind_g) & (last_p == last_g)

        def by_kind(kind: Tensor, of: Tensor) -> Tensor:
            ids = torch.arange(1, len(self.kinds) + 1, device=kind.device)
            return ((kind[..., None] == ids) & of[..., None]).sum((0, 1))

        return by_kind(kind_g, right), by_kind(kind_p, first_p) + by_kind(kind_g, first_g)

    def _found(self, tags: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return at each place its kind, whether a span begins, and where the next one to end does: (B, W) each."""
        kind, begin = self._kind.to(tags.device)[tags], self._begin.to(tags.device)[tags]
        before = torch.nn.functional.pad(kind, (1, 0))[:, :-1]
        first = (kind > 0) & (begin | (kind != before))
        goes_on = torch.nn.functional.pad((kind > 0) & ~first, (0, 1))[:, 1:]
        ends = (kind > 0) & ~goes_on
        width = tags.shape[1]
        places = torch.where(ends, torch.arange(width, device=tags.device), width)
        return kind, first, places.flip(1).cummin(1).values.flip(1)
