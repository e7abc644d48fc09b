"""The two ways in which a run ends that are not a fault of ours. Exit statuses are those of the command line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """The user's mistake, told in one message: it names the key, file or row, and says what to do. Exit status 2."""

    agreed: bool | None = None
    """False when one process alone raises it, and must tell it itself; what all raise alike is told by the first."""


def agreed(error: UserError) -> UserError:
    """Mark an error that every process raises alike, from inside the loop, where that is not so by itself."""
    error.agreed = True
    return error


class Interrupted(Exception):
    """Stopped before the end (a signal, a full disk); the newest complete checkpoint is safe. Exit status 3."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ' Did you mean `x`?' for the closest known word, or the list of known words, or ''."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f" Did you mean `{close[0]}`?"
    return f" Known: {', '.join(names)}." if names else ""
