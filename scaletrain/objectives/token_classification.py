"""Token classification: a tag for each word, by cross-entropy at the word's first piece.

L = Σ -log p(tag of w | text) over words. Shapes: B texts, T positions, W words, C tags.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, ClassVar, final

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field

from scaletrain.data.classes import Classes
from scaletrain.data.tagged import TaggedTexts, Words
from scaletrain.data.text import IGNORE, encode, tokenise
from scaletrain.data.tokenizers import filler
from scaletrain.errors import UserError
from scaletrain.evaluate.sums import Spans, f1, f1_terms
from scaletrain.objectives._text import TextConfig, TextObjective, encoded, say_full
from scaletrain.objectives.base import Networks, Request, Samples
from scaletrain.player import Batch, Term, Turn

if TYPE_CHECKING:
    from torch import Tensor

    from scaletrain.data.sources import Rows

_WHY = "the list of the words' tags"


class Config(TextConfig):
    """Options of the objective."""

    names: list[str] | None = Field(None, min_length=2)
    """Of the tags, where the data have ids: `[O, B-PER, I-PER, ...]`. With such names (BIO), spans are scored."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target that is spread over all tags (Szegedy et al., 2016), in training only."""


@final
class Objective(TextObjective[Config]):
    """The tags of words, by one network, `model`."""

    takes_prompts: ClassVar[bool] = True
    kind: ClassVar[str] = "token_classifier"
    throughput: ClassVar[str] = "words"

    def prepare(self, train: Rows, eval: Rows | None) -> None:
        """Number the tags, find the tokenizer and check the network. Raises UserError that names the key or row."""
        train.require("tokens", "the list of words")
        self.classes = self.classes or self._find_classes(train)
        self.tokenizer = self.find_tokenizer(train, "tokens")
        # One of its own: a tokenizer must not be used by two threads at a time.
        self._words = Words(copy.deepcopy(self.tokenizer), self.check_network())

    def _find_classes(self, train: Rows) -> Classes:
        names = self.config.names
        found = Classes.find_listed(train, train.require("tags", _WHY), len(names) if names else None)
        if names and found.named and not set(found.names) <= set(names):
            raise UserError(f"objective.names lacks tags of the data: {', '.join(set(found.names) - set(names))}.")
        return dataclasses.replace(found, names=tuple(names)) if names else found

    def examples(self, rows: Rows, training: bool, window: bool = False) -> TaggedTexts:
        """Tokenise, and encode the tags. Raises UserError that names the row."""
        assert self.classes is not None
        tags = self.classes.encode_listed(rows, rows.require("tags", _WHY))
        for i, (words, count) in enumerate(zip(rows.column("tokens"), np.diff(tags.offsets).tolist(), strict=True)):
            if words is not None and len(words) != count:
                raise UserError(f"{rows.name(i)}: {len(words)} words in `tokens`, but {count} in `tags`.")
        tokens = encode(rows, self._words) if window else tokenise(rows, self._words)
        if not window:
            say_full(tokens, rows, self._words.max_length)
        return TaggedTexts(tokens, tags, rows, filler(self._words.tokenizer))

    def counts(self, turn: Turn, batch: Batch) -> dict[str, int]:
        """Return the words that have a tag, `words`, and the real tokens, `tokens`."""
        return {"words": int((batch["labels"] != IGNORE).sum()), "tokens": int(batch["attention_mask"].sum())}

    def loss(self, turn: Turn, networks: Networks, batch: Batch) -> dict[str, Term]:
        """Return the cross-entropy, and how many words are right, for the log."""
        return _terms(_logits(networks, batch), batch["labels"], self.config.label_smoothing)

    def evaluate(self, networks: Networks, batch: Batch) -> dict[str, Term]:
        """Return the loss without smoothing, the accuracy, and what the F1 of spans is made of."""
        logits, labels = _logits(networks, batch), batch["labels"]
        terms = _terms(logits, labels, 0.0)
        if spans := self._spans:
            terms |= f1_terms(spans.kinds, *spans.count(logits.argmax(-1), labels), "words")
        return terms

    def conclude(self, metrics: dict[str, float]) -> dict[str, float]:
        """Add F1 of spans: over all of them, as `f1`, and of each kind; their mean is `f1_macro`."""
        if not self._spans:
            return metrics
        found = f1(metrics, micro=True)
        return found | {"f1": found.pop("f1_micro"), "f1_macro": found["f1"]}

    @property
    def _spans(self) -> Spans | None:
        """What counts spans, where the tags are of the BIO kind."""
        assert self.classes is not None
        try:
            return Spans(self.classes.names)
        except ValueError:
            return None

    def sample(self, networks: Networks, request: Request) -> Samples | None:
        """Tag the words of the request's texts; nothing is drawn without them."""
        if not request.prompts:
            return None
        assert self.tokenizer is not None
        assert self.classes is not None
        model, texts = networks["model"], [text.split() or [""] for text in request.prompts]
        done = Words(copy.deepcopy(self.tokenizer), self.longest(model)).encode([texts], request.prompts)
        with torch.no_grad():
            logits = model(**self.batch_of([" ".join(t) for t in texts], model, request.generator.device)).logits
        told = []
        for words, marks, best in zip(texts, done.marks or [], logits.argmax(-1).tolist(), strict=True):
            tags, word = ["?"] * len(words), -1
            for mark, tag in zip(marks, best, strict=False):
                word += mark
                if mark:
                    tags[word] = self.classes.names[tag]
            told.append(" ".join(f"{word}/{tag}" for word, tag in zip(words, tags, strict=True)))
        return Samples(texts=told)


def _logits(networks: Networks, batch: Batch) -> Tensor:
    """Return the logits at the words' first pieces, (B, W, C)."""
    logits: Tensor = networks["model"](**encoded(batch)).logits
    return logits.gather(1, batch["places"][..., None].expand(-1, -1, logits.shape[-1])).float()


def _terms(logits: Tensor, labels: Tensor, smoothing: float) -> dict[str, Term]:
    flat = labels.flatten()
    loss = F.cross_entropy(logits.flatten(0, 1), flat, ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing)
    right = (logits.detach().argmax(-1) == labels).sum()
    return {"loss": Term(loss, per="words"), "accuracy": Term(right, per="words", weight=0.0)}
