"""What objectives of one transformer over texts share: its tokenizer, the check of its embeddings, what is kept."""

from __future__ import annotations

import dataclasses
import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import nn

from scaletrain.config import NetworkSpec, Recipe, Strict
from scaletrain.data.cache import content_key
from scaletrain.data.chats import text
from scaletrain.data.classes import FILE, Classes
from scaletrain.data.text import Tokens, pad
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
from scaletrain.networks._positions import beside, fitting, left, positions, virtual_tokens
from scaletrain.networks.build import network_module
from scaletrain.objectives import base
from scaletrain.player import Batch, Turn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerFast

    from scaletrain.data.sources import Rows

log = logging.getLogger("scaletrain")

TOKENIZER_ROWS = 20_000
"""Rows of a stream that a tokenizer is trained on."""

LONGEST = 1 << 24
"""Positions; a tokenizer that names more has no bound."""


class TextConfig(Strict):
    """Options that these objectives share."""

    tokenizer: TokenizerConfig = TokenizerConfig()


C = TypeVar("C", bound=TextConfig)


class TextObjective(base.Objective[C]):
    """An objective whose network reads whole texts, padded at the right, with the tokenizer that came with it."""

    windowed: ClassVar[bool] = True
    data_keys: ClassVar[frozenset[str]] = frozenset({"seq_len"})
    kind: ClassVar[str]
    """Type of the network that is trained."""
    trained: ClassVar[str] = "model"
    """Its name."""

    def __init__(self, config: C, recipe: Recipe):
        super().__init__(config, recipe)
        self.spec = recipe.networks.get(self.trained, NetworkSpec())
        if not (self.spec.path or self.spec.source or "model_type" in self.spec.config):
            raise UserError(
                f"networks.{self.trained}: give the `path` of a pretrained network, or a `config` with a model_type."
            )
        self.tokenizer: PreTrainedTokenizerFast | None = None
        self.classes: Classes | None = None
        self._settings: dict[str, Any] = {}

    def found(self) -> dict[str, Any]:
        """Return what the data told of the network: its classes, if it has any."""
        if self.classes is None:
            return {}
        names = dict(enumerate(self.classes.names))
        return {"num_labels": len(names), "id2label": names, "label2id": {name: i for i, name in names.items()}}

    def networks(self) -> dict[str, NetworkSpec]:
        """Return the network; a new one has the tokenizer's vocabulary and special tokens."""
        found = {**self._settings, **self.found()}
        return {self.trained: base.completed(self.recipe, self.trained, self.kind, **found)}

    def facts(self) -> dict[str, str]:
        """Return the tokenizer's."""
        assert self.tokenizer is not None
        return {"the tokenizer": content_key(identity(self.tokenizer))}

    def restore(self, folders: Mapping[str, Path]) -> None:
        """Take the tokenizer, and the classes where there are any, from the network's folder."""
        folder = folders.get(self.trained)
        if folder:
            self.tokenizer = load_tokenizer(str(folder), "the network's folder")
            self.classes = Classes.load(folder) if (folder / FILE).exists() else None

    def save_assets(self, network: str, folder: Path) -> None:
        """Write the tokenizer, and the classes where there are any, beside the network."""
        assert self.tokenizer is not None
        if network == self.trained:
            self.tokenizer.save_pretrained(folder)
            if self.classes is not None:
                self.classes.save(folder)

    @abstractmethod
    def counts(self, turn: Turn, batch: Batch) -> dict[str, int]:
        """Return, with what the loss is divided by, the real tokens as `tokens`."""

    def find_tokenizer(self, train: Rows, *columns: str) -> PreTrainedTokenizerFast:
        """Return the tokenizer of a path, of the network, or one trained on columns, of texts or of lists of words."""
        given = self.config.tokenizer
        if self.tokenizer is not None:
            return self.tokenizer
        if given.path:
            return load_tokenizer(given.path, "objective.tokenizer.path")
        if given.vocab_size:
            rows = train.sample(TOKENIZER_ROWS) if train.streaming else train
            told = "text" if columns == ("text",) else " ".join(columns)
            return train_tokenizer(_texts(rows, columns), given.vocab_size, f"{told} {train.fingerprint}")
        if self.spec.path:
            return load_tokenizer(self.spec.path, f"networks.{self.trained}.path")
        raise UserError(
            "objective.tokenizer: set `path`, or `vocab_size` to train a byte-level BPE on the training text."
        )

    def check_network(self) -> int:
        """Check the network's embeddings before a weight is read; return how many positions a text may take."""
        assert self.tokenizer is not None
        key = f"networks.{self.trained}"
        wanted, limit = self.recipe.data.seq_len, int(self.tokenizer.model_max_length)
        virtual = virtual_tokens(self.spec.adapter)
        if not self.spec.source:
            if not self.spec.path:
                self._settings = self.known(special_ids(self.tokenizer)) | self._settings
            settings, module = self.outlined()
            check_vocabulary(self.tokenizer, settings.vocab_size, key)
            if bound := positions(module):
                limit = min(limit, left(bound, virtual))
            if settings.pad_token_id is None:  # heads over the last token find it by what is no padding
                self._settings = {**self._settings, "pad_token_id": filler(self.tokenizer)}
        if wanted and wanted > limit:
            raise UserError(f"data.seq_len={wanted}: the network has {limit} positions{beside(virtual)}. Lower it.")
        if not wanted and limit > LONGEST:
            raise UserError(
                "data.seq_len is missing: neither the tokenizer nor the network bounds the length of a text."
            )
        return wanted or limit

    def known(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return those of some settings that the architecture of a new network has."""
        from scaletrain.networks._transformers import config_class

        cls = config_class(self.spec.config["model_type"])
        names = {field.name for field in dataclasses.fields(cls)} | set(cls.attribute_map)
        return {name: value for name, value in settings.items() if name in names}

    def outlined(self, name: str | None = None) -> tuple[Any, nn.Module]:
        """Return the configuration of a network, and the network without weights. Raises UserError."""
        name = name or self.trained
        spec = self.networks()[name]
        factory: Any = network_module(spec.type or self.kind, f"networks.{name}")
        if not hasattr(factory, "read_config"):
            raise UserError(f"networks.{name}.type: `{spec.type}` is no transformer; leave it out.")
        config = decode(factory.Config, spec.config, f"networks.{name}.config").read_as(spec)
        with torch.device("meta"):
            module = factory.outline(spec.path, config, torch.float32) if spec.path else factory.build(config)
        return module.config.get_text_config(), module

    def longest(self, network: nn.Module) -> int:
        """Return how many tokens of a text a network that is there is given; padded, they fit."""
        assert self.tokenizer is not None
        room = positions(network)
        bounds = (LONGEST, self.recipe.data.seq_len, int(self.tokenizer.model_max_length), room and fitting(room))
        return min(bound for bound in bounds if bound)

    def batch_of(self, texts: Sequence[str], network: nn.Module, device: torch.device) -> dict[str, torch.Tensor]:
        """Return texts of a request as a batch for a network, cut to fit: input_ids and attention_mask, (B, T)."""
        assert self.tokenizer is not None
        done = self.tokenizer(list(texts), truncation=True, max_length=self.longest(network))
        self.tokenizer.backend_tokenizer.no_truncation()  # it stays on otherwise, and would be saved
        arrays = [np.asarray(ids) for ids in done["input_ids"]]
        padded = {
            "input_ids": pad(arrays, filler(self.tokenizer)),
            "attention_mask": pad([np.ones_like(a) for a in arrays], 0),
        }
        return {name: tensor.to(device) for name, tensor in padded.items()}


def _texts(rows: Rows, columns: Sequence[str]) -> Iterator[str]:
    """Yield every text. Raises UserError that names the row."""
    for column in columns:
        for i, value in enumerate(rows.column(rows.require(column, "the text"))):
            yield text(" ".join(map(str, value)) if isinstance(value, (list, tuple)) else value, column, rows.name(i))


def say_full(tokens: Tokens, rows: Rows, limit: int) -> None:
    """Say how many texts may have been cut to `limit` tokens."""
    if full := int((tokens.lengths >= limit).sum()):
        log.warning("%s of %s texts fill all %d positions and may be cut", f"{full:,}", f"{len(rows):,}", limit)


def encoded(batch: Batch) -> dict[str, torch.Tensor]:
    """Return the part of a batch that a network reads."""
    return {k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids") if k in batch}
