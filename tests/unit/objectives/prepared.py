"""What a run does with rows before it trains on them."""

from typing import Any

from scaletrain.assemble import examples_of
from scaletrain.data.sources import Rows
from scaletrain.objectives.base import Data, Objective


def prepared(objective: Objective[Any], train: Rows, held: Rows | None) -> Data:
    """Make examples of one source."""
    return examples_of(objective, [train], {} if held is None else {"": held})
