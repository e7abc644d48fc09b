"""Sequence to sequence: an encoder reads a source, a decoder learns to write its target (Vaswani et al., 2017).

L = Σ -log p(y_t | y_<t, x) over the target's tokens, the end of text among them, divided by their number in the global
batch. Shapes: B rows, S positions of sources, T of targets, V tokens of the vocabulary.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, final

import torch
import torch.nn.functional as F
from pydantic import Field

from scaletrain.config import Strict
from scaletrain.data.exchanges import ExchangedTexts, Exchanges
from scaletrain.data.text import IGNORE, encode, tokenise
from scaletrain.data.tokenizers import end_of_text, filler
from scaletrain.errors import UserError, did_you_mean
from scaletrain.explain import decode
from scaletrain.objectives._text import TextConfig, TextObjective
from scaletrain.objectives.base import Networks, Request, Samples
from scaletrain.player import Batch, Term, Turn

if TYPE_CHECKING:
    from scaletrain.data.sources import Rows

START_FILE = "decoder_start.json"
ROLES = (("source", "target"), ("prompt", "completion"))
SOURCES = 64
"""How many sources are kept to write targets for, as samples."""


class SamplingConfig(Strict):
    """How targets are written: the likeliest that a beam search finds."""

    max_new_tokens: int = Field(64, ge=1)
    beams: int = Field(4, ge=1)
    """1 takes the likeliest token each time."""
    length_penalty: float = 1.0
    """Power of the length by which a beam's log probability is divided; more favours long targets."""


class Config(TextConfig):
    """Options of the objective."""

    target_len: int | None = Field(None, ge=2)
    """Tokens to which targets are cut; by default as many as sources, `data.seq_len`."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target that is spread over the whole vocabulary (Szegedy et al., 2016), in training only."""
    sampling: SamplingConfig = SamplingConfig()


@final
class Objective(TextObjective[Config]):
    """Targets from sources, by one network, `model`."""

    takes_prompts: ClassVar[bool] = True
    kind: ClassVar[str] = "seq2seq"
    throughput: ClassVar[str] = "tokens"
    _sources: tuple[str, ...] = ()
    _start: int

    def prepare(self, train: Rows, eval: Rows | None) -> None:
        """Find the columns and the tokenizer, and check the network. Raises UserError that names the key."""
        from scaletrain.networks.seq2seq import start_of

        roles = next((r for r in ROLES if set(r) <= set(train.columns)), ROLES[0])
        train.require(roles[0], "the text to read")
        train.require(roles[1], "the text to write")
        self.tokenizer = self.find_tokenizer(train, *roles)
        if not (self.spec.path or self.spec.source):
            # The defaults are of the tokenizer that the architecture was first trained with.
            end = end_of_text(self.tokenizer)
            self._settings = self.known({"decoder_start_token_id": end, "forced_eos_token_id": end})
        source_len = self.check_network()
        if self.spec.source is None:
            settings, _ = self.outlined()
            self._start = start_of(settings)
            self._check_lengths(getattr(settings, "max_position_embeddings", None))
        # One of its own: a tokenizer must not be used by two threads at a time.
        own = copy.deepcopy(self.tokenizer)
        self._exchanges = Exchanges(own, roles, source_len, self.config.target_len or source_len)

    def _check_lengths(self, limit: int | None) -> None:
        own = self.config
        lengths = {"target_len": own.target_len, "sampling.max_new_tokens": own.sampling.max_new_tokens}
        for key, length in lengths.items():
            if limit and length and length > limit:
                raise UserError(f"objective.{key}={length}: the network has {limit} positions. Lower it.")

    def examples(self, rows: Rows, training: bool, window: bool = False) -> ExchangedTexts:
        """Tokenise. Raises UserError that names the row."""
        tokens = encode(rows, self._exchanges) if window else tokenise(rows, self._exchanges)
        if not window:
            column, step = rows.column(self._exchanges.roles[0]), max(1, len(rows) // SOURCES)
            self._sources = () if rows.streaming else tuple(column[i] for i in range(0, len(rows), step)[:SOURCES])
        return ExchangedTexts(tokens, rows, filler(self._exchanges.tokenizer), self._start)

    def restore(self, folders: Mapping[str, Path]) -> None:
        """Take the tokenizer, and the token that targets begin with, from the network's folder."""
        super().restore(folders)
        if "model" in folders:
            self._start = json.loads((folders["model"] / START_FILE).read_text())["start"]

    def save_assets(self, network: str, folder: Path) -> None:
        """Write them beside the network."""
        super().save_assets(network, folder)
        (folder / START_FILE).write_text(json.dumps({"start": self._start}) + "\n")

    def counts(self, turn: Turn, batch: Batch) -> dict[str, int]:
        """Return the targets' tokens, `targets`, and those with the sources', `tokens`."""
        targets = int((batch["labels"] != IGNORE).sum())
        return {"targets": targets, "tokens": targets + int(batch["attention_mask"].sum())}

    def loss(self, turn: Turn, networks: Networks, batch: Batch) -> dict[str, Term]:
        """Return the cross-entropy, and how many tokens are right after the right ones before, for the log."""
        return _terms(networks, batch, self.config.label_smoothing)

    def evaluate(self, networks: Networks, batch: Batch) -> dict[str, Term]:
        """Return the loss without smoothing, and the same accuracy."""
        return _terms(networks, batch, 0.0)

    def conclude(self, metrics: dict[str, float]) -> dict[str, float]:
        """Add the perplexity, e to the loss."""
        return metrics | {"perplexity": math.exp(metrics["loss"]) if metrics["loss"] < 700 else math.inf}

    def sample(self, networks: Networks, request: Request) -> Samples | None:
        """Write targets for the sources of the request, or for some of the data."""
        sources = request.prompts or self._sources
        if not sources:
            return None
        options = {**self.config.sampling.model_dump(), **request.options}
        for key in options:
            if key not in SamplingConfig.model_fields:
                hint = did_you_mean(key, SamplingConfig.model_fields)
                raise UserError(f"no sampling option is called `{key}`.{hint}")
        how = decode(SamplingConfig, options, "sampling")
        if not request.prompts:
            count = min(request.count, len(sources))
            sources = tuple(sources[i * len(sources) // count] for i in range(count))
        found = self.write(networks["model"], sources, how, request.generator.device)
        return Samples(texts=[f"{source} → {target}" for source, target in zip(sources, found, strict=True)])

    @torch.no_grad()
    def write(
        self, model: Any, sources: Sequence[str], how: SamplingConfig, device: torch.device, batch: int = 16
    ) -> list[str]:
        """Return the target that a beam search finds for each source, a batch of them at a time."""
        assert self.tokenizer is not None
        settings = copy.deepcopy(model.generation_config)
        settings.update(
            max_length=None, max_new_tokens=how.max_new_tokens, num_beams=how.beams, do_sample=False,
            length_penalty=how.length_penalty if how.beams > 1 else None, early_stopping=how.beams > 1,
            decoder_start_token_id=self._start, pad_token_id=filler(self.tokenizer),
            eos_token_id=self.tokenizer.eos_token_id,
        )  # fmt: skip
        texts: list[str] = []
        for first in range(0, len(sources), batch):
            inputs = self.batch_of(sources[first : first + batch], model, device)
            ids = model.generate(**inputs, generation_config=settings)
            texts += self.tokenizer.batch_decode(ids.tolist(), skip_special_tokens=True)
        return texts


def _terms(networks: Networks, batch: Batch, smoothing: float) -> dict[str, Term]:
    read = {k: batch[k] for k in ("input_ids", "attention_mask", "decoder_input_ids")}
    logits, labels = networks["model"](**read, use_cache=False).logits, batch["labels"]
    loss = F.cross_entropy(
        logits.flatten(0, 1).float(),
        labels.flatten(),
        ignore_index=IGNORE,
        reduction="sum",
        label_smoothing=smoothing,
    )
    right = (logits.detach().argmax(-1) == labels).sum()
    return {"loss": Term(loss, per="targets"), "accuracy": Term(right, per="targets", weight=0.0)}
