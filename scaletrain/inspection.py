"""What a family says of its training data before they are trained on, source by source."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from scaletrain.data.contract import Inspection
from scaletrain.data.dataset import Dataset
from scaletrain.data.mixture import Mixture
from scaletrain.data.stream import WINDOW, Stream
from scaletrain.errors import UserError
from scaletrain.objectives.base import Data, Objective

log = logging.getLogger("scaletrain")


def inspected(objective: Objective[Any], data: Data) -> Iterator[tuple[str, Inspection]]:
    """Yield what the family says of each training source, by its name; of a stream, of some of its rows."""
    sets: dict[str, Dataset]
    if isinstance(data.train, Stream):
        sets = {f"{s.label}, a sample": s.expand(s.rows.sample(WINDOW)) for s in data.train.sources}
    elif isinstance(data.train, Mixture):
        sets = dict(zip(data.train.labels, data.train.datasets, strict=True))
    else:
        sets = {"data": data.train}
    for label, dataset in sets.items():
        if found := objective.inspect(dataset):
            yield label, found


def say(objective: Objective[Any], data: Data) -> None:
    """Log what the family says of the training data. Raises UserError when it refuses them."""
    for label, found in inspected(objective, data):
        for line in found.lines:
            log.info("%s: %s", label, line)
        if found.wrong:
            raise UserError(found.wrong[0])
