"""Text classification: cross-entropy of one class for a text, or for a pair of texts."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, final

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field

from scaletrain.config import NetworkSpec, Recipe, Strict
from scaletrain.data.cache import content_key
from scaletrain.data.classes import Classes
from scaletrain.data.contract import Inspection, figures, histogram, lengths_in_words
from scaletrain.data.dataset import Dataset
from scaletrain.data.formats import Pairs, texts
from scaletrain.data.text import LabelledTexts, encode, pad, tokenise
from scaletrain.data.tokenizers import (
    TokenizerConfig,
    check_vocabulary,
    filler,
    identity,
    load_tokenizer,
    special_ids,
    train_tokenizer,
)
from scaletrain.errors import UserError
from scaletrain.explain import decode
from scaletrain.objectives import base
from scaletrain.objectives.base import Networks, Request, Samples
from scaletrain.player import Batch, Term, Turn

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerFast

    from scaletrain.data.sources import Rows

log = logging.getLogger("scaletrain")

CLASSES_SHOWN = 8
"""Of those with the most texts, in what is said of the data."""
TOKENIZER_ROWS = 20_000
"""Rows of a stream that a tokenizer is trained on."""


class Config(Strict):
    """Options of the objective."""

    num_classes: int | None = Field(None, ge=2)
    """By default as many as the training labels tell."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target that is spread over all classes (Szegedy et al., 2016), in training only."""


@final
class Objective(base.Objective[Config]):
    """Cross-entropy of the class, by one network, `model`."""

    windowed: ClassVar[bool] = True
    data_keys: ClassVar[frozenset[str]] = frozenset({"seq_len"})

    def __init__(self, config: Config, recipe: Recipe):
        super().__init__(config, recipe)
        self.spec = recipe.networks.get("model", NetworkSpec())
        if not (self.spec.path or self.spec.source or "model_type" in self.spec.config):
            raise UserError("networks.model: give the `path` of a pretrained network, or a `config` with a model_type.")
        self.tokenizer: PreTrainedTokenizerFast | None = None
        self.classes: Classes | None = None
        self._settings: dict[str, Any] = {}

    def prepare(self, train: Rows, eval: Rows | None) -> None:
        """Number the classes, find the tokenizer and check the network. Raises UserError that names the key or row."""
        label = train.require("label", "the class of a text")
        self.classes = self.classes or Classes.find(train, label, self.config.num_classes)
        self.tokenizer = self.tokenizer or self._find_tokenizer(train)
        # One of its own: a tokenizer must not be used by two threads at a time.
        self._pairs = Pairs(copy.deepcopy(self.tokenizer), self._check_network(), "text_pair" in train.columns)

    def examples(self, rows: Rows, training: bool, window: bool = False) -> LabelledTexts:
        """Tokenise, and encode the classes. Raises UserError that names the row."""
        assert self.classes is not None
        fmt = self._pairs
        labels = self.classes.encode(rows, rows.require("label", "the class of a text"))
        tokens = encode(rows, fmt) if window else tokenise(rows, fmt)
        if not window and (full := int((tokens.lengths == fmt.max_length).sum())):
            log.warning(
                "%s of %s texts fill all %d positions and may be cut", f"{full:,}", f"{len(rows):,}", fmt.max_length
            )
        typed = "token_type_ids" in fmt.tokenizer.model_input_names
        return LabelledTexts(tokens, labels, rows, filler(fmt.tokenizer), typed)

    def inspect(self, dataset: Dataset) -> Inspection:
        """Say how many texts each class has, how long they are, and which occur again."""
        assert isinstance(dataset, LabelledTexts)
        assert self.classes is not None
        tokens, rows = dataset.tokens, dataset.rows
        numbers = np.bincount(dataset.labels, minlength=len(self.classes.names)).tolist()
        named = sorted(zip(numbers, self.classes.names, strict=True), reverse=True)
        shown = ", ".join(f"{name} {n / len(rows):.1%}" for n, name in named[:CLASSES_SHOWN])
        others = (
            f" and {len(named) - CLASSES_SHOWN:,} more, the fewest {named[-1][0]:,}" if named[CLASSES_SHOWN:] else ""
        )
        again = figures(tokens, ()).again()
        such = f", such as {rows.name(int(again[0]))}" if len(again) else ""
        return Inspection(
            (
                f"{len(rows):,} texts in {len(named):,} classes: {shown}{others}",
                f"{lengths_in_words(tokens.lengths)}; {len(again):,} texts occur again{such}",
            ),
            tuple(histogram(tokens.lengths)),
        )

    def facts(self) -> dict[str, str]:
        """Return the tokenizer's."""
        assert self.tokenizer is not None
        return {"the tokenizer": content_key(identity(self.tokenizer))}

    def _find_tokenizer(self, train: Rows) -> PreTrainedTokenizerFast:
        given = self.config.tokenizer
        if given.path:
            return load_tokenizer(given.path, "objective.tokenizer.path")
        if given.vocab_size:
            rows = train.sample(TOKENIZER_ROWS) if train.streaming else train
            return train_tokenizer(texts(rows, "text"), given.vocab_size, f"text {train.fingerprint}")
        if self.spec.path:
            return load_tokenizer(self.spec.path, "networks.model.path")
        raise UserError(
            "objective.tokenizer: set `path`, or `vocab_size` to train a byte-level BPE on the training text."
        )

    def _check_network(self) -> int:
        """Check the network's embeddings before a weight is read; return how many positions a text may take."""
        from scaletrain.networks import text_classifier

        assert self.tokenizer is not None
        wanted, limit = self.recipe.data.seq_len, int(self.tokenizer.model_max_length)
        if not self.spec.source:
            if not self.spec.path:
                self._settings = special_ids(self.tokenizer)
            spec = self.networks()["model"]
            config = decode(text_classifier.Config, spec.config, "networks.model.config")
            settings: Any = (
                text_classifier.read_config(spec.path, config) if spec.path else text_classifier.new_config(config)
            )
            settings = settings.get_text_config()
            check_vocabulary(self.tokenizer, settings.vocab_size, "networks.model")
            limit = min(limit, getattr(settings, "max_position_embeddings", None) or limit)
            if settings.pad_token_id is None:  # heads over the last token find it by what is no padding
                self._settings = {**self._settings, "pad_token_id": filler(self.tokenizer)}
        if wanted and wanted > limit:
            raise UserError(f"data.seq_len={wanted}: the network has {limit} positions. Lower it.")
        return wanted or limit

    def restore(self, folders: Mapping[str, Path]) -> None:
        """Take the tokenizer and the classes from the network's folder."""
        if "model" in folders:
            self.tokenizer = load_tokenizer(str(folders["model"]), "the network's folder")
            self.classes = Classes.load(folders["model"])

    def save_assets(self, network: str, folder: Path) -> None:
        """Write the tokenizer and the classes beside the network."""
        assert self.tokenizer is not None
        assert self.classes is not None
        self.tokenizer.save_pretrained(folder)
        self.classes.save(folder)

    def networks(self) -> dict[str, NetworkSpec]:
        """Return the network with the classes of the data."""
        assert self.classes is not None
        names = dict(enumerate(self.classes.names))
        found = {"num_labels": len(names), "id2label": names, "label2id": {name: i for i, name in names.items()}}
        return {"model": base.completed(self.recipe, "model", "text_classifier", **found, **self._settings)}

    def counts(self, turn: Turn, batch: Batch) -> dict[str, int]:
        """Return the texts, `samples`, and their real tokens, `tokens`."""
        return {"samples": len(batch["labels"]), "tokens": int(batch["attention_mask"].sum())}

    def loss(self, turn: Turn, networks: Networks, batch: Batch) -> dict[str, Term]:
        """Return the sum of the cross-entropy over texts, and how many are right, for the log."""
        return self._terms(networks["model"], batch, self.config.label_smoothing)

    def evaluate(self, networks: Networks, batch: Batch) -> dict[str, Term]:
        """Return the loss without smoothing, and the accuracy."""
        return self._terms(networks["model"], batch, 0.0)

    def _terms(self, model: nn.Module, batch: Batch, smoothing: float) -> dict[str, Term]:
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits.float()
        loss = F.cross_entropy(logits, batch["labels"], reduction="sum", label_smoothing=smoothing)
        right = (logits.detach().argmax(-1) == batch["labels"]).sum()
        return {"loss": Term(loss, per="samples"), "accuracy": Term(right, per="samples", weight=0.0)}

    def sample(self, networks: Networks, request: Request) -> Samples | None:
        """Classify the texts of the request; nothing is drawn without them."""
        if not request.prompts:
            return None
        assert self.tokenizer is not None
        assert self.classes is not None
        ids = self.tokenizer(list(request.prompts), truncation=True)["input_ids"]
        arrays = [np.asarray(i) for i in ids]
        inputs = {
            "input_ids": pad(arrays, filler(self.tokenizer)),
            "attention_mask": pad([np.ones_like(a) for a in arrays], 0),
        }
        with torch.no_grad():
            logits = networks["model"](**{k: v.to(request.generator.device) for k, v in inputs.items()}).logits.float()
        shares, found = logits.softmax(-1).max(-1)
        return Samples(
            texts=[
                f"{self.classes.names[c]} ({p:.0%}): {text}"
                for c, p, text in zip(found.tolist(), shares.tolist(), request.prompts, strict=True)
            ]
        )
