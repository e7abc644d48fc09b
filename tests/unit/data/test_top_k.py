"""What is kept of a teacher: parts, their batches, mixtures of sources, and parts that are not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scaletrain.data.mixture import Mixture, Shares
from scaletrain.data.text import IGNORE, Blocks, LanguageDataset, Samples, Tokens
from scaletrain.data.top_k import CALLS, TopK, WithTopK
from scaletrain.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALETRAIN_CACHE", str(tmp_path / "cache"))


def blocks(count: int, seed: int = 0) -> LanguageDataset:
    """Documents in so many blocks of 5 places; the first token of a document is not learned."""
    ids = np.random.default_rng(seed).integers(0, 50, 5 * count + 1).astype(np.uint16)
    no_rows: Any = None  # they are for what is said of the data
    return Blocks(Tokens(ids, None, np.arange(0, len(ids) + 1, 7)), no_rows, 5, fill=0, isolated=True)


def filled(dataset: LanguageDataset, batch: int) -> tuple[TopK, int]:
    """Write of each place its label and the two tokens after it, with probabilities 1/2, 1/4, 1/8 and a rest of 1/8."""
    kept = TopK(dataset, batch, "a teacher")
    parts = kept.missing()
    for part in parts:
        found, lengths = [], []
        for examples in kept.calls(part):
            if examples:
                labels = dataset.collate([dataset.at(i) for i in examples])["labels"]
                learned = labels[labels != IGNORE]
                logs = torch.tensor([2, 4, 8, 8]).reciprocal().log().expand(len(learned), 4)
                found.append((torch.stack([learned, learned + 1, learned + 2], 1), logs))
                lengths += labels.ne(IGNORE).sum(1).tolist()
        kept.write(part, found, lengths)
    return kept, len(parts)


@pytest.mark.parametrize("count", [3, 2 * CALLS, 2 * CALLS + 1, 100])
def test_every_example_has_its_own(count: int) -> None:
    dataset = blocks(count)
    kept, parts = filled(dataset, batch=2)
    assert parts == -(-count // (2 * CALLS))
    assert kept.missing() == []
    assert [len(kept.calls(part)) for part in range(parts)] == [CALLS] * parts
    assert [i for part in range(parts) for call in kept.calls(part) for i in call] == list(range(count))
    both = WithTopK(dataset, kept)
    chosen = np.random.default_rng(1).permutation(count)[:20].tolist()
    batch = both.batch(chosen, np.zeros(len(chosen), np.uint64))
    learned = batch["labels"].flatten()[batch["learned"]]
    assert torch.equal(batch["teacher_ids"], torch.stack([learned, learned + 1, learned + 2], 1))
    torch.testing.assert_close(
        batch["teacher_logs"].exp(), torch.tensor([0.5, 0.25, 0.125, 0.125]).expand(len(learned), 4), rtol=0, atol=2e-4
    )


def test_sources_that_are_mixed_keep_theirs_apart() -> None:
    sets = [WithTopK(d, filled(d, 4)[0]) for d in (blocks(40, 1), blocks(30, 2))]
    shares = Shares.of([{0: 1.0}, {0: 1.0}], [1.0, 1.0], lambda step: step)
    mixed = Mixture(sets, shares, ["a", "b"])
    batch = mixed.batch([3, 45, 69, 39], np.zeros(4, np.uint64))
    learned = batch["labels"].flatten()[batch["learned"]]
    assert torch.equal(batch["teacher_ids"][:, 0], learned)


def test_what_is_not_there_is_said() -> None:
    dataset = blocks(10)
    with pytest.raises(UserError, match=r"is not there: .* Start the run again"):
        WithTopK(dataset, TopK(dataset, 2, "a teacher")).batch([0], np.zeros(1, np.uint64))


def test_other_content_is_kept_elsewhere() -> None:
    filled(blocks(10), 2)
    assert TopK(blocks(10), 2, "a teacher").missing() == []
    assert TopK(blocks(10, seed=1), 2, "a teacher").missing()
    assert TopK(blocks(10), 2, "another teacher").missing()


def samples(seq_len: int, packed: bool = False) -> Samples:
    """100 rows of 5 places, but for one of 30, which is far from every row that a sample of 64 would look at."""
    lengths = np.full(100, 6)
    lengths[2] = 31
    ids = np.random.default_rng(0).integers(0, 50, int(lengths.sum())).astype(np.uint16)
    rows: Any = range(100)  # counted, for what is said of the data
    return Samples(Tokens(ids, None, np.concatenate([[0], lengths.cumsum()])), rows, seq_len, fill=0, packed=packed)


def test_rows_cut_or_packed_in_another_way_are_kept_elsewhere() -> None:
    def kind(dataset: LanguageDataset) -> str:
        return TopK(dataset, 2, "a teacher")._kept._kind

    assert kind(samples(20)) == kind(samples(20))
    assert kind(samples(20)) != kind(samples(30))
    packs, others = samples(30, packed=True), samples(30, packed=True)
    assert kind(packs) == kind(others) != kind(samples(30))
    others._order = others._order.copy()
    others._order[7:9] = others._order[[8, 7]]
    assert kind(packs) != kind(others)


def test_it_is_as_long_as_its_data_set() -> None:
    dataset, every = samples(20), np.arange(100)
    found = WithTopK(dataset, TopK(dataset, 2, "a teacher")).lengths(every)
    assert found is not None
    assert found.tolist() == dataset.sizes().tolist()
    packs = samples(30, packed=True)
    assert WithTopK(packs, TopK(packs, 2, "a teacher")).lengths(every[:2]) is None
