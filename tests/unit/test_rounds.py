"""Work before the training: processes do parts of one kind at a time, so that they call networks equally often."""

from __future__ import annotations

from scaletrain.config import NetworkSpec
from scaletrain.enrichment import _rounds
from scaletrain.objectives.base import ahead_of, together


class Source:
    """Parts, of which some are missing."""

    def __init__(self, parts: int, *there: int):
        self.parts, self.there = parts, set(there)

    def missing(self) -> list[int]:
        return [part for part in range(self.parts) if part not in self.there]


def test_rounds_have_parts_of_one_source_and_one_work() -> None:
    done: list[tuple[str, Source, int]] = []
    long, short, other = Source(5, 1), Source(1), Source(2)
    spec = {"a": NetworkSpec()}
    first = ahead_of(spec, [long, short], lambda networks, device, source, part: done.append(("first", source, part)))
    second = ahead_of(
        {"b": NetworkSpec()}, [other], lambda networks, device, source, part: done.append(("second", source, part))
    )
    both = together(first, second)
    assert both.networks.keys() == {"a", "b"}
    rounds = _rounds(both.missing(), both.kind, 3)
    said = []
    for parts in rounds:
        done.clear()
        for part in parts:
            both.do({}, None, part)  # type: ignore[arg-type]
        assert len({(work, id(source)) for work, source, _ in done}) == 1
        said += done
    assert sorted((work, source.parts, part) for work, source, part in said) == [
        ("first", 1, 0), ("first", 5, 0), ("first", 5, 2), ("first", 5, 3), ("first", 5, 4),
        ("second", 2, 0), ("second", 2, 1),
    ]  # fmt: skip
    assert max(map(len, rounds)) == 3
    assert together(None, second) is second
