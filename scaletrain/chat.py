"""A conversation with the newest checkpoint of a run, in the terminal or by lines of a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from scaletrain.data.order import key_of
from scaletrain.errors import UserError
from scaletrain.finished import FinishedStage, default_device
from scaletrain.objectives.base import Objective, Request

HELP = "/system TEXT sets the system turn, /undo takes back a turn, /reset all of them; Ctrl-D ends"

Message = dict[str, Any]


def chat(folder: Path, system: str | None = None, seed: int | None = None, options: Mapping[str, Any] = {}) -> None:
    """Talk with a run: a line of standard input is a turn of the user; answers go to standard output as they come.

    options: how answers are drawn. Raises UserError for families that do not talk.
    """
    run = FinishedStage.open(folder)
    if type(run.objective).reply is Objective.reply:
        raise UserError(f"`{run.stage.recipe.objective.type}` does not talk; try `scaletrain sample`.")
    run.restore()
    device = default_device()
    networks = run.networks(device)
    key = run.stage.recipe.seed if seed is None else seed
    request = Request(1, torch.Generator(device).manual_seed(key_of(key, "chat")), options=options)

    def answer(messages: list[Message]) -> str:
        with torch.no_grad():
            return run.objective.reply(networks, messages, request, _write)

    if sys.stdin.isatty():
        print(HELP, file=sys.stderr)
        converse(_typed(), answer, _write, system, forgiving=True)
    else:
        converse((line.rstrip("\n") for line in sys.stdin), answer, _write, system)


def converse(
    lines: Iterable[str],
    answer: Callable[[list[Message]], str],
    write: Callable[[str], None],
    system: str | None = None,
    forgiving: bool = False,
) -> list[Message]:
    """Take turns until the lines end; return what was said. `answer` writes what it returns.

    forgiving: go on after a turn that cannot be answered, or whose answer is interrupted; it is taken back.
    """
    said: list[Message] = _opened(system)
    for line in lines:
        word, _, rest = line.strip().partition(" ")
        if word in ("/reset", "/system"):
            if word == "/system":
                system = rest.strip() or None
            said = _opened(system)
        elif word == "/undo":
            del said[max(len(_opened(system)), len(said) - 2) :]
        elif word.startswith("/"):
            write(f"{HELP}\n")
        elif word:
            said.append({"role": "user", "content": line})
            try:
                said.append({"role": "assistant", "content": answer(said)})
            except (UserError, KeyboardInterrupt) as error:
                if not forgiving:
                    raise
                said.pop()
                write(f"({error or 'taken back'})")
            write("\n")
    return said


def _opened(system: str | None) -> list[Message]:
    return [{"role": "system", "content": system}] if system else []


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _typed() -> Iterator[str]:
    """Yield what is typed, with the line editing of the terminal."""
    import readline  # noqa: F401 (its import is what gives input() its editing)

    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
