import json
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from scaletrain.config import Duration, SourceSpec
from scaletrain.data import stream as module
from scaletrain.data.dataset import Dataset, Example
from scaletrain.data.loader import Failure, Layout, Windows
from scaletrain.data.mixture import Mixture, Shares
from scaletrain.data.order import Int, Lanes, Ordering
from scaletrain.data.sources import Rows, open_rows
from scaletrain.data.stream import Cursor, Source, Stream
from scaletrain.errors import UserError
from scaletrain.objectives.base import Data
from scaletrain.player import Turn
from scaletrain.position import steps_of


class Divisors(Dataset):
    """A row with number n comes to n % 3 examples; rows that say so are broken."""

    def __init__(self, rows: Rows):
        taken = rows.take(["n"], np.arange(len(rows)))["n"]
        self.items = [(n, k) for n in taken for k in range(n % 3)]

    def __len__(self) -> int:
        return len(self.items)

    def example(self, index: int, rng: np.random.Generator) -> Example:
        n, k = self.items[index]
        return {"n": n, "k": k, "noise": rng.standard_normal()}

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        return {key: torch.tensor([e[key] for e in examples]) for key in ("n", "k", "noise")}

    def name(self, index: int) -> str:
        return f"row {self.items[index][0]}"


def stream_of(folder: Path, *counts: int, weights: tuple[float, ...] | None = None) -> Stream:
    sources = []
    for s, count in enumerate(counts):
        path = folder / f"{s}.jsonl"
        path.write_text("".join(json.dumps({"n": 1_000_000 * s + i}) + "\n" for i in range(count)))
        rows = open_rows([SourceSpec(path=str(path), stream=True)])
        sources.append(Source(str(path), rows, Divisors, None))
    return Stream(tuple(sources), Shares((0,), (weights,)) if weights else None)


Seen = list[tuple[int, int, float]]


def read(
    data: Stream,
    world: int,
    windows: int,
    start: int = 0,
    cursors: dict[int, Cursor] | None = None,
    skipped: Sequence[int] = (),
    micro: int = 2,
) -> tuple[list[Seen], dict[int, Cursor]]:
    """Return what each window holds, in the order of the lanes, and where all lanes stand in the end."""
    found: list[dict[int, Seen]] = [{} for _ in range(windows)]
    ends: dict[int, Cursor] = {}
    for rank in range(world):
        loader = Windows(data, Layout(24, micro, world, rank), (0, "s"), start, cursors=cursors, skipped=skipped)
        for window in found:
            micros = next(loader)
            assert isinstance(micros, list)
            for m in micros:
                assert m.cursor is not None
                window[m.number] = list(
                    zip(m.tensors["n"].tolist(), m.tensors["k"].tolist(), m.tensors["noise"].tolist(), strict=True)
                )
                ends[m.number] = m.cursor
    return [[s for number in sorted(w) for s in w[number]] for w in found], ends


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW", 8)


@pytest.mark.parametrize("weights", [None, (0.7, 0.3)])
def test_a_stream_is_the_same_on_any_number_of_processes(tmp_path: Path, weights: tuple[float, ...] | None) -> None:
    data = stream_of(tmp_path, 500, 300, weights=weights) if weights else stream_of(tmp_path, 500)
    one, ends = read(data, 1, 30)
    for world in (2, 3, 4):
        assert read(data, world, 30) == (one, ends)


@pytest.mark.parametrize("weights", [None, (0.7, 0.3)])
def test_a_stream_goes_on_from_its_cursors_on_another_number(tmp_path: Path, weights: tuple[float, ...] | None) -> None:
    data = stream_of(tmp_path, 500, 300, weights=weights) if weights else stream_of(tmp_path, 500)
    whole, _ = read(data, 1, 30)
    for world in (1, 2, 4):
        first, cursors = read(data, world, 13)
        rest, _ = read(data, 5 - world if world != 1 else 2, 17, 13, json.loads(json.dumps(cursors), object_hook=_keys))
        assert first + rest == whole


def _keys(value: dict[str, Cursor]) -> dict[int, Cursor]:
    return {int(k): v for k, v in value.items()}


def test_every_example_of_an_epoch_comes_once(tmp_path: Path) -> None:
    data = stream_of(tmp_path, 480)  # of 12 lanes, 40 rows each: 40 examples, but for the lanes' own mix of rows
    seen = [(n, k) for window in read(data, 1, 60)[0] for n, k, _ in window]
    times = {(n, k): seen.count((n, k)) for n in range(480) for k in range(n % 3)}
    assert set(seen) == set(times)
    assert 1 <= min(times.values()) <= max(times.values()) <= 5  # 3 epochs, and lanes are at most one apart
    assert sum(times.values()) == 60 * 24


def test_skipped_windows_are_read_past(tmp_path: Path) -> None:
    data = stream_of(tmp_path, 500)
    whole, _ = read(data, 1, 10)
    found, _ = read(data, 2, 8, skipped=[2, 5])
    assert found == [w for i, w in enumerate(whole) if i not in (2, 5)]


def test_rows_that_come_to_nothing_are_told(tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text("".join(json.dumps({"n": 3 * i}) + "\n" for i in range(50)))
    rows = open_rows([SourceSpec(path=str(path), stream=True)])
    loader = Windows(Stream((Source("empty.jsonl", rows, Divisors, None),)), Layout(4, 2), (0,))
    found = next(loader)
    assert isinstance(found, Failure)
    assert "nothing to learn in a whole epoch" in found.message


def test_a_row_that_cannot_be_read_is_told_after_those_before_it(tmp_path: Path) -> None:
    class Broken(Divisors):
        def __init__(self, rows: Rows):
            super().__init__(rows)
            if any(n == 70 for n, _ in self.items):
                raise UserError("row 70 is broken")

    source = stream_of(tmp_path, 100).sources[0]
    loader = Windows(Stream((Source("x", source.rows, Broken, None),)), Layout(4, 4), (0,))
    found = [next(loader) for _ in range(30)]
    assert not isinstance(found[0], Failure)
    assert found[-1] == Failure("row 70 is broken")


def test_an_error_in_the_thread_is_raised_where_it_is_waited_for(tmp_path: Path) -> None:
    class Broken(Divisors):
        def example(self, index: int, rng: np.random.Generator) -> Example:
            raise ZeroDivisionError

    source = stream_of(tmp_path, 100).sources[0]
    loader = Windows(Stream((Source("x", source.rows, Broken, None),)), Layout(4, 4), (0,))
    with pytest.raises(ZeroDivisionError):
        next(loader)


@pytest.mark.parametrize("key", ["train.duration", "checkpoint.every"])
def test_a_stream_has_no_epochs_to_count_steps_by(key: str, tmp_path: Path) -> None:
    data = Data(stream_of(tmp_path, 10))
    with pytest.raises(UserError, match=f"{key} is in epochs"):
        steps_of(Duration(1, "epochs"), (Turn("t", "t"),), data, 4, key)


def test_the_thread_ends_with_the_loader(tmp_path: Path) -> None:
    loader = Windows(stream_of(tmp_path, 100), Layout(4, 4), (0,))
    next(loader)
    assert "batches" in [thread.name for thread in threading.enumerate()]
    del loader
    assert "batches" not in [thread.name for thread in threading.enumerate()]


class Noted(Dataset):
    """Row numbers of rows that stream; notes what it is told."""

    def __init__(self, rows: Rows, told: list[np.ndarray], held: Sequence[int] = ()):
        self.rows, self.told, self.kept = rows, told, set(held)

    def __len__(self) -> int:
        return len(self.rows)

    def order(self, lanes: Lanes, shuffle: int, *seed: object) -> Ordering:
        return self.rows.order(lanes, shuffle, *seed)

    def prefetch(self, indices: Int) -> None:
        self.told.append(indices)

    def held(self, indices: Int) -> Dataset:
        return Noted(self.rows.held(indices), self.told, indices.tolist())

    def example(self, index: int, rng: np.random.Generator) -> Example:
        assert index in self.kept
        return {"n": self.rows.row(index)["n"], "noise": rng.standard_normal()}

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        return {key: torch.tensor([e[key] for e in examples]) for key in ("n", "noise")}


@pytest.mark.parametrize("mixed", [False, True])
def test_rows_that_are_held_come_in_the_same_order_from_anywhere(tmp_path: Path, mixed: bool) -> None:
    """On any number of processes, with workers, and wherever it starts; the chunks of later ones are told before."""
    told: list[np.ndarray] = []
    sets = [Noted(source.rows, told) for source in stream_of(tmp_path, 30_000, 30_000).sources[: 1 + mixed]]
    data = Mixture(sets, Shares((0,), ((0.5, 0.5),)), ["a", "b"]) if mixed else sets[0]

    def seen(world: int, start: int, windows: int, workers: int = 0) -> list[list[tuple[float, float]]]:
        found: list[dict[int, list[tuple[float, float]]]] = [{} for _ in range(windows)]
        for rank in range(world):
            loader = Windows(data, Layout(24, 6, world, rank), (0,), start, workers, shuffle=2000)
            for window in found:
                micros = next(loader)
                assert isinstance(micros, list)
                for m in micros:
                    window[m.number] = list(zip(m.tensors["n"].tolist(), m.tensors["noise"].tolist(), strict=True))
        return [[s for number in sorted(w) for s in w[number]] for w in found]

    whole = seen(1, 0, 60)
    numbers = [n for window in whole for n, _ in window]
    order = data.order(Lanes(4, 6), 2000, 0)(np.arange(60 * 24))
    assert numbers == [int(i % 30_000 + 1_000_000 * (i // 30_000)) for i in order]
    assert seen(2, 17, 43) == seen(4, 17, 43) == seen(1, 17, 43, workers=2) == whole[17:]
    told.clear()
    seen(1, 60, 1)
    if not mixed:
        later = Lanes(4, 6).position(np.arange(4), np.full(4, 60 * 6 + 500))  # a quarter of `shuffle` on in each lane
        assert set(data.order(Lanes(4, 6), 2000, 0)(later).tolist()) <= set(np.concatenate(told).tolist())
