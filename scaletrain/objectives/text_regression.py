"""Text regression: a number for a text, or for a pair of texts, by squared error.

L = Σ (f(x) - y)² over texts. Shapes: B texts.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, ClassVar, final

import numpy as np
import torch

from scaletrain.data.formats import Pairs
from scaletrain.data.text import LabelledTexts
from scaletrain.errors import UserError
from scaletrain.evaluate.sums import correlation_terms, pearson
from scaletrain.objectives._text import TextConfig, TextObjective, encoded
from scaletrain.objectives.base import Networks, Request, Samples
from scaletrain.objectives.text_classification import labelled_texts
from scaletrain.player import Batch, Term, Turn

if TYPE_CHECKING:
    import numpy.typing as npt

    from scaletrain.data.sources import Rows


class Config(TextConfig):
    """Options of the objective."""


@final
class Objective(TextObjective[Config]):
    """The number of a text, by one network, `model`, with a single output."""

    takes_prompts: ClassVar[bool] = True
    kind: ClassVar[str] = "text_classifier"

    def prepare(self, train: Rows, eval: Rows | None) -> None:
        """Find the tokenizer and check the network. Raises UserError that names the key."""
        train.require("label", "the number of a text")
        self.tokenizer = self.find_tokenizer(train, "text")
        # One of its own: a tokenizer must not be used by two threads at a time.
        self._pairs = Pairs(copy.deepcopy(self.tokenizer), self.check_network(), "text_pair" in train.columns)

    def found(self) -> dict[str, object]:
        """Return that the network has one output."""
        return {"num_labels": 1, "problem_type": "regression"}

    def examples(self, rows: Rows, training: bool, window: bool = False) -> LabelledTexts:
        """Tokenise, and read the numbers. Raises UserError that names the row."""
        return labelled_texts(rows, self._pairs, _numbers(rows, rows.require("label", "the number of a text")), window)

    def counts(self, turn: Turn, batch: Batch) -> dict[str, int]:
        """Return the texts, `samples`, and their real tokens, `tokens`."""
        return {"samples": len(batch["labels"]), "tokens": int(batch["attention_mask"].sum())}

    def loss(self, turn: Turn, networks: Networks, batch: Batch) -> dict[str, Term]:
        """Return the squared error."""
        return _squared(_predicted(networks, batch), batch["labels"])

    def evaluate(self, networks: Networks, batch: Batch) -> dict[str, Term]:
        """Return the squared error, and what Pearson's correlation is made of."""
        predicted = _predicted(networks, batch)
        return _squared(predicted, batch["labels"]) | correlation_terms(predicted, batch["labels"], "samples")

    def conclude(self, metrics: dict[str, float]) -> dict[str, float]:
        """Add the root of the mean squared error, and Pearson's correlation."""
        return pearson(metrics) | {"rmse": math.sqrt(metrics["loss"])}

    def sample(self, networks: Networks, request: Request) -> Samples | None:
        """Give the texts of the request their numbers; nothing is drawn without them."""
        if not request.prompts:
            return None
        with torch.no_grad():
            batch = self.batch_of(request.prompts, networks["model"], request.generator.device)
            found = _predicted(networks, batch).tolist()
        return Samples(texts=[f"{number:.3f}: {text}" for number, text in zip(found, request.prompts, strict=True)])


def _predicted(networks: Networks, batch: Batch) -> torch.Tensor:
    """Return the number of each text, (B,)."""
    logits: torch.Tensor = networks["model"](**encoded(batch)).logits
    return logits.float()[:, 0]


def _squared(predicted: torch.Tensor, labels: torch.Tensor) -> dict[str, Term]:
    return {"loss": Term((predicted - labels).square().sum(), per="samples")}


def _numbers(rows: Rows, column: str) -> npt.NDArray[np.float32]:
    """Read a column of finite numbers, (N,). Raises UserError that names the row."""
    for i, value in enumerate(rows.column(column)):
        number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
        if not (number and math.isfinite(value)):
            raise UserError(f"{rows.name(i)}: `{column}` is {value!r}, not a number")
    return np.fromiter(rows.column(column), np.float32, len(rows))
