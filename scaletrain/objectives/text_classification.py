"""Text classification: one class for a text, or for a pair of texts, by cross-entropy; or any number, each by itself.

Shapes: B texts, T positions, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, final

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field

from scaletrain.data.classes import Classes
from scaletrain.data.contract import Inspection, figures, histogram, lengths_in_words
from scaletrain.data.dataset import Dataset
from scaletrain.data.formats import Pairs
from scaletrain.data.text import LabelledTexts, encode, tokenise
from scaletrain.data.tokenizers import filler
from scaletrain.evaluate.sums import f1, f1_terms, hits
from scaletrain.objectives._text import TextConfig, TextObjective, encoded, say_full
from scaletrain.objectives.base import Networks, Request, Samples
from scaletrain.player import Batch, Term, Turn

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

    from scaletrain.data.sources import Rows

SCORED = 100
"""Classes up to which each has an F1 of its own."""
CLASSES_SHOWN = 8
"""Of those with the most texts, in what is said of the data."""


class Config(TextConfig):
    """Options of the objective."""

    num_classes: int | None = Field(None, ge=2)
    """By default as many as the training labels tell."""
    multi_label: bool = False
    """A text has a list of classes, `labels`, which may be empty, in place of one `label`."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target that is spread over all classes (Szegedy et al., 2016), in training only."""


def labelled_texts(rows: Rows, fmt: Pairs, labels: npt.NDArray[np.generic], window: bool) -> LabelledTexts:
    """Tokenise rows and put a label, or several, to each. window: see `Objective.examples`."""
    tokens = encode(rows, fmt) if window else tokenise(rows, fmt)
    if not window:
        say_full(tokens, rows, fmt.max_length)
    typed = "token_type_ids" in fmt.tokenizer.model_input_names
    return LabelledTexts(tokens, labels, rows, filler(fmt.tokenizer), typed)


@final
class Objective(TextObjective[Config]):
    """The classes of a text, by one network, `model`."""

    kind: ClassVar[str] = "text_classifier"
    takes_prompts: ClassVar[bool] = True

    def prepare(self, train: Rows, eval: Rows | None) -> None:
        """Number the classes, find the tokenizer and check the network. Raises UserError that names the key or row."""
        if self.config.multi_label:
            label = train.require("labels", "the list of a text's classes")
            self.classes = self.classes or Classes.find_listed(train, label, self.config.num_classes)
        else:
            label = train.require("label", "the class of a text")
            self.classes = self.classes or Classes.find(train, label, self.config.num_classes)
        self.tokenizer = self.find_tokenizer(train, "text")
        # One of its own: a tokenizer must not be used by two threads at a time.
        self._pairs = Pairs(copy.deepcopy(self.tokenizer), self.check_network(), "text_pair" in train.columns)

    def found(self) -> dict[str, object]:
        """Return the classes, and whether a text may have several."""
        several = {"problem_type": "multi_label_classification"} if self.config.multi_label else {}
        return super().found() | several

    def examples(self, rows: Rows, training: bool, window: bool = False) -> LabelledTexts:
        """Tokenise, and encode the classes. Raises UserError that names the row."""
        return labelled_texts(rows, self._pairs, self._labels(rows), window)

    def _labels(self, rows: Rows) -> npt.NDArray[np.generic]:
        """Return the ids of the classes, (N,), or whether a text is of each, (N, C) float."""
        assert self.classes is not None
        if not self.config.multi_label:
            return self.classes.encode(rows, rows.require("label", "the class of a text"))
        lists = self.classes.encode_listed(rows, rows.require("labels", "the list of a text's classes"))
        of_each = np.zeros((len(rows), len(self.classes)), np.float32)
        of_each[np.repeat(np.arange(len(rows)), np.diff(lists.offsets)), lists.labels] = 1
        return of_each

    def inspect(self, dataset: Dataset) -> Inspection:
        """Say how many texts each class has, how long they are, and which occur again."""
        assert isinstance(dataset, LabelledTexts)
        assert self.classes is not None
        tokens, rows = dataset.tokens, dataset.rows
        of_each = dataset.labels.sum(0) if self.config.multi_label else np.bincount(dataset.labels)
        numbers = [*of_each.astype(int).tolist(), *[0] * (len(self.classes) - len(of_each))]
        named = sorted(zip(numbers, self.classes.names, strict=True), reverse=True)
        shown = ", ".join(f"{name} {n / len(rows):.1%}" for n, name in named[:CLASSES_SHOWN])
        others = (
            f" and {len(named) - CLASSES_SHOWN:,} more, the fewest {named[-1][0]:,}" if named[CLASSES_SHOWN:] else ""
        )
        again = figures(tokens, ()).again
        such = f", such as {rows.name(int(again[0]))}" if len(again) else ""
        return Inspection(
            (
                f"{len(rows):,} texts in {len(named):,} classes: {shown}{others}",
                f"{lengths_in_words(tokens.lengths)}; {len(again):,} texts occur again{such}",
            ),
            tuple(histogram(tokens.lengths)),
        )

    def counts(self, turn: Turn, batch: Batch) -> dict[str, int]:
        """Return the texts, `samples`, and their real tokens, `tokens`."""
        return {"samples": len(batch["labels"]), "tokens": int(batch["attention_mask"].sum())}

    def loss(self, turn: Turn, networks: Networks, batch: Batch) -> dict[str, Term]:
        """Return the cross-entropy (of several classes, the mean over them), and how many are right, for the log."""
        logits = networks["model"](**encoded(batch)).logits.float()
        return self._terms(logits, batch["labels"], self.config.label_smoothing)

    def evaluate(self, networks: Networks, batch: Batch) -> dict[str, Term]:
        """Return the loss without smoothing, the accuracy (of all classes of a text), and what F1 is made of."""
        assert self.classes is not None
        logits, labels = networks["model"](**encoded(batch)).logits.float(), batch["labels"]
        terms = self._terms(logits, labels, 0.0)
        if len(self.classes) <= SCORED:
            several, count = self.config.multi_label, len(self.classes)
            chosen = self._chosen(logits) if several else F.one_hot(logits.argmax(-1), count).bool()
            gold = labels.bool() if several else F.one_hot(labels, count).bool()
            terms |= f1_terms(self.classes.names, *hits(chosen, gold), "samples")
        return terms

    def conclude(self, metrics: dict[str, float]) -> dict[str, float]:
        """Add F1, of each class and their mean."""
        assert self.classes is not None
        return f1(metrics, self.config.multi_label) if len(self.classes) <= SCORED else metrics

    def _chosen(self, logits: Tensor) -> Tensor:
        """Return which classes a text is said to have: (B, C) bool."""
        return logits > 0

    def _terms(self, logits: Tensor, labels: Tensor, smoothing: float) -> dict[str, Term]:
        if self.config.multi_label:
            target = labels * (1 - smoothing) + smoothing / 2
            loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(-1).sum()
            right = (self._chosen(logits.detach()) == labels.bool()).all(-1).sum()
        else:
            loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
            right = (logits.detach().argmax(-1) == labels).sum()
        return {"loss": Term(loss, per="samples"), "accuracy": Term(right, per="samples", weight=0.0)}

    def sample(self, networks: Networks, request: Request) -> Samples | None:
        """Classify the texts of the request; nothing is drawn without them."""
        if not request.prompts:
            return None
        assert self.classes is not None
        names = self.classes.names
        with torch.no_grad():
            batch = self.batch_of(request.prompts, networks["model"], request.generator.device)
            logits = networks["model"](**batch).logits.float()
        if not self.config.multi_label:
            return classified(logits, names, request.prompts)
        said = [
            ", ".join(f"{names[c]} ({p:.0%})" for c, p in enumerate(shares) if p > 0.5) or "none"
            for shares in logits.sigmoid().tolist()
        ]
        return Samples(texts=[f"{what}: {text}" for what, text in zip(said, request.prompts, strict=True)])


def classified(logits: Tensor, names: Sequence[str], texts: Sequence[str]) -> Samples:
    """Say the class of each text. logits: (B, C)."""
    shares, found = logits.softmax(-1).max(-1)
    return Samples(
        texts=[
            f"{names[c]} ({p:.0%}): {text}" for c, p, text in zip(found.tolist(), shares.tolist(), texts, strict=True)
        ]
    )
