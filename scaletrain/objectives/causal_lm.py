"""Causal language models: next-token cross-entropy on documents, prompts with completions, or chats.

L = Σ -log p(x_{t+1} | x_≤t) over the learned tokens, divided by their number in the global batch.
Shapes: B sequences (or packs), T positions, K learned ones of all B · T, V tokens of the vocabulary.
"""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, final

import torch
import torch.nn.functional as F
from pydantic import Field

from scaletrain.config import NetworkSpec, Recipe
from scaletrain.data import formats
from scaletrain.data.cache import content_key
from scaletrain.data.contract import Inspection, inspect
from scaletrain.data.dataset import Dataset
from scaletrain.data.text import Blocks, LanguageDataset, Samples, Tokens, encode, tokenise
from scaletrain.data.tokenizers import (
    TokenizerConfig,
    check_vocabulary,
    filler,
    identity,
    load_tokenizer,
    read_chat_template,
    special_ids,
    train_tokenizer,
)
from scaletrain.data.turns import Learn
from scaletrain.errors import UserError
from scaletrain.explain import decode
from scaletrain.networks import heads
from scaletrain.networks._positions import beside, left, virtual_tokens
from scaletrain.objectives._generative import Generative, GenerativeConfig
from scaletrain.objectives.base import Networks
from scaletrain.player import Batch, Term, Turn

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerFast

    from scaletrain.data.sources import Rows

log = logging.getLogger("scaletrain")

FORMAT_FILE = "data_format.json"
VOCABULARY = 4096
"""Tokens of a tokenizer that is trained here, when neither it nor the network says how many."""
TOKENIZER_ROWS = 20_000
"""Rows of a stream that a tokenizer is trained on."""
PROMPTS, PROMPT_TOKENS = 64, 16
"""How many prompts are taken from the data, and their length where the data has no prompts."""


class LanguageConfig(GenerativeConfig):
    """Options of every objective over a causal language model: its rows, and how texts are drawn."""

    format: formats.FormatName | None = None
    """text, completion, chat, conversations, alpaca or chat_completion; by default what the columns tell."""
    learn: Learn | None = None
    """completion, assistant (its turns), last (its last turn) or all; by default the first that the format has."""
    max_lost: float = Field(0.05, ge=0, le=1)
    """Share of the rows that may be left without an answer: they have none, or lose all of it at data.seq_len."""
    chat_template: str | None = None
    """A Jinja file, in place of the tokenizer's own chat template."""
    tokenizer: TokenizerConfig = TokenizerConfig()


class Config(LanguageConfig):
    """Options of the objective."""

    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target that is spread over the whole vocabulary (Szegedy et al., 2016), in training only."""
    z_loss: float = Field(0.0, ge=0)
    """Factor of (log Z)², Z the sum of all exp(logit), in training only: 1e-4 in PaLM (Chowdhery et al., 2022, 5)."""
    neftune_alpha: float = Field(0.0, ge=0)
    """Noise on the embeddings in training: uniform in ± alpha / √(L H) in a sample of L tokens (Jain et al., 2023)."""


@final
class Objective(Generative[Config]):
    """Next-token prediction by one network, `model`; or, for an objective over several, what concerns the one named."""

    throughput: ClassVar[str] = "tokens"
    windowed: ClassVar[bool] = True
    data_keys: ClassVar[frozenset[str]] = frozenset({"seq_len", "packing"})

    def __init__(self, config: Config, recipe: Recipe, network: str = "model"):
        super().__init__(config, recipe)
        self.speaker = network
        self.spec = recipe.networks.get(network, NetworkSpec())
        if not (self.spec.path or self.spec.source or "model_type" in self.spec.config):
            raise UserError(
                f"networks.{network}: give the `path` of a pretrained network, or a `config` with a model_type."
            )
        self._format: formats.FormatName = config.format or "text"
        self._checked = False
        self.embeddings: int | None = None
        self._trained_on = heads.CrossEntropy(config.label_smoothing, config.z_loss)

    def prepare(self, train: Rows, eval: Rows | None) -> None:
        """Find the format and the tokenizer, and check the network. Raises UserError that names the key or row."""
        if self.recipe.data.seq_len is None:
            raise UserError("data.seq_len is missing: say how many tokens a sequence may have.")
        names = [formats.detect(run, self.config.format) for run in train.alike()]
        for name, run in zip(names, train.alike(), strict=True):
            log.info("data format: %s (%s)", name, ", ".join(formats.columns(run, name)))
        self._format = max(names, key=list(formats.ROLES).index)
        self.check_judge()
        self.tokenizer = self.tokenizer or self._find_tokenizer(train)
        if self.config.chat_template:
            self.tokenizer.chat_template = read_chat_template(self.config.chat_template)
        self.check_network(self.recipe.data.seq_len)
        for name in names:
            formats.language_format(name, self.tokenizer, self.config.learn)
        # One of its own: a tokenizer must not be used by two threads at a time.
        self._reading = copy.deepcopy(self.tokenizer)

    def examples(self, rows: Rows, training: bool, window: bool = False) -> LanguageDataset:
        """Tokenise, mask, and cut or pack to `data.seq_len`. Raises UserError that names the row."""
        seq_len, packing = self.recipe.data.seq_len, self.recipe.data.packing
        assert self.tokenizer is not None
        assert seq_len is not None
        readers = self._readers(rows)
        plain = {isinstance(reader, formats.Documents) for reader in readers}
        if len(plain) > 1:
            raise UserError(
                "plain text and rows with answers cannot be put one after the other: give each source of data.train a "
                "`weight`, and evaluate on one kind."
            )
        tokens = encode(rows, *readers) if window else tokenise(rows, *readers)
        fill = filler(self.tokenizer)
        found: LanguageDataset
        if plain == {True}:
            found = Blocks(tokens, rows, seq_len, fill, isolated=packing, empty=window)
        else:
            found = Samples(tokens, rows, seq_len, fill, packed=packing, empty=window)
        if not window:
            self.prompts = list(_prompts(tokens))
        return found

    def _readers(self, rows: Rows) -> list[formats.Format]:
        """Return the format of each run of rows that are alike."""
        found = []
        for run in rows.alike():
            name = formats.detect(run, self.config.format)
            found.append(
                formats.language_format(name, self._reading, self.config.learn, self.config.template_options, run)
            )
        return found

    def inspect(self, dataset: Dataset) -> Inspection:
        """Return the data contract."""
        assert isinstance(dataset, LanguageDataset)
        batch = self.recipe.train.micro_batch or self.recipe.train.global_batch
        return inspect(dataset, self._readers, self._reading, self.embeddings, batch, self.config.max_lost)

    def facts(self) -> dict[str, str]:
        """Return the tokenizer's."""
        assert self.tokenizer is not None
        return {"the tokenizer": content_key(identity(self.tokenizer))}

    def _find_tokenizer(self, train: Rows) -> PreTrainedTokenizerFast:
        given = self.config.tokenizer
        if given.path:
            return load_tokenizer(given.path, "objective.tokenizer.path")
        if self.spec.path and not given.vocab_size:
            return load_tokenizer(self.spec.path, f"networks.{self.speaker}.path")
        if self.spec.source and not given.vocab_size:
            raise UserError(f"{self.spec.source} has no tokenizer: set objective.tokenizer.path.")
        size = given.vocab_size or self.spec.config.get("vocab_size", VOCABULARY)
        runs = (train.sample(TOKENIZER_ROWS) if train.streaming else train).alike()
        texts = chain.from_iterable(formats.texts(run, formats.detect(run, self.config.format)) for run in runs)
        return train_tokenizer(texts, size, f"{self._format} {train.fingerprint}")

    def check_network(self, seq_len: int) -> None:
        """Check the network's embeddings, of tokens and of positions, before a weight is read."""
        from scaletrain.networks import causal_lm

        spec, tokenizer = self.networks()[self.speaker], self.tokenizer
        assert tokenizer is not None
        if spec.source:
            return  # its weights fit its configuration, and its tokenizer came with it
        config = decode(causal_lm.Config, spec.config, f"networks.{self.speaker}.config").read_as(spec)
        settings = (
            causal_lm.read_config(spec.path, config) if spec.path else causal_lm.new_config(config)
        ).get_text_config()
        check_vocabulary(tokenizer, settings.vocab_size, f"networks.{self.speaker}")
        self.embeddings = settings.vocab_size
        limit, virtual = getattr(settings, "max_position_embeddings", None), virtual_tokens(spec.adapter)
        wanted = self.config.sampling.max_new_tokens
        if limit and wanted and wanted >= limit - virtual:
            raise UserError(
                f"objective.sampling.max_new_tokens={wanted}: the network has {limit - virtual} positions in all. "
                "Lower it."
            )
        if limit and seq_len > (room := left(limit, virtual)):
            raise UserError(
                f"data.seq_len={seq_len}: the network has {room} positions{beside(virtual)}. Lower it, or, for a new "
                f"network, raise networks.{self.speaker}.config.max_position_embeddings."
            )

    def restore(self, folders: Mapping[str, Path]) -> None:
        """Take the tokenizer and the format of prompts from the network's folder."""
        if self.speaker in folders:
            self.tokenizer = load_tokenizer(str(folders[self.speaker]), "the network's folder")
            written = folders[self.speaker] / FORMAT_FILE
            self._format = json.loads(written.read_text())["format"] if written.exists() else self._format

    def save_assets(self, network: str, folder: Path) -> None:
        """Write the tokenizer and the format of prompts beside the network."""
        assert self.tokenizer is not None
        self.tokenizer.save_pretrained(folder)
        (folder / FORMAT_FILE).write_text(json.dumps({"format": self._format}) + "\n")

    def networks(self) -> dict[str, NetworkSpec]:
        """Return the network; a new one has the tokenizer's vocabulary and special tokens unless the recipe differs."""
        spec = self.spec.model_copy(update={"type": self.spec.type or "causal_lm"})
        if not (spec.path or spec.source):
            assert self.tokenizer is not None
            spec = spec.model_copy(update={"config": {**special_ids(self.tokenizer), **spec.config}})
        return {self.speaker: spec}

    def counts(self, turn: Turn, batch: Batch) -> dict[str, int]:
        """Return the learned tokens, `targets`, and the real ones, `tokens`."""
        return {"targets": len(batch["learned"]), "tokens": int(batch["lengths"].sum())}

    def loss(self, turn: Turn, networks: Networks, batch: Batch) -> dict[str, Term]:
        """Return the sum of the cross-entropy over the learned tokens; as a figure, too, where that is changed."""
        model, alpha = networks[self.speaker], self.config.neftune_alpha
        if not self._checked:
            check_attention(model, batch, self.recipe.data.packing)
            if alpha and not heads.takes_noise(model):
                raise UserError("objective.neftune_alpha: this network's type takes no noise; leave it out.")
            self._checked = True
        noise = {"noise": alpha * sample_lengths(batch).rsqrt()} if alpha else {}
        sums = self._sums(model, batch, self._trained_on, noise)
        found = {"loss": Term(sums[0], per="targets")}
        if self._trained_on != heads.CrossEntropy():
            found["cross_entropy"] = Term(sums[1].detach(), per="targets", weight=0.0)
        return found

    def evaluate(self, networks: Networks, batch: Batch) -> dict[str, Term]:
        """Return the loss without smoothing, and how many learned tokens are the most likely ones."""
        loss, right = self._sums(networks[self.speaker], batch, heads.judged)
        return {"loss": Term(loss, per="targets"), "accuracy": Term(right, per="targets", weight=0.0)}

    @staticmethod
    def _sums(
        model: nn.Module, batch: Batch, reduction: heads.Reduction, more: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        inputs = {name: batch[name] for name in ("input_ids", "position_ids") if name in batch} | dict(more or {})
        targets = batch["labels"].flatten().index_select(0, batch["learned"])
        return heads.reduce(model, inputs, batch["learned"], reduction, [targets])

    def conclude(self, metrics: dict[str, float]) -> dict[str, float]:
        """Add the perplexity, e to the loss."""
        return metrics | {"perplexity": math.exp(metrics["loss"]) if metrics["loss"] < 700 else math.inf}


def forward(model: nn.Module, input_ids: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
    """Return logits (B, T, V). Padding is at the right, so that no mask is needed; positions isolate the samples."""
    positions = {} if position_ids is None else {"position_ids": position_ids}
    logits: torch.Tensor = model(input_ids=input_ids, use_cache=False, **positions).logits
    return logits


def sample_lengths(batch: Batch) -> torch.Tensor:
    """Return, at each place, how many tokens the sample has that it is in: (B, T)."""
    ids = batch["input_ids"]
    if "position_ids" not in batch:
        return batch["lengths"][:, None].expand_as(ids)
    positions, places = batch["position_ids"], torch.arange(ids.shape[1], device=ids.device)
    # The end of a sample is the first place, from here on, that is followed by position 0.
    follows = F.pad(positions[:, 1:], (0, 1)) == 0
    ends = torch.where(follows, places, ids.shape[1]).flip(1).cummin(1).values.flip(1)
    return positions.gather(1, ends) + 1


def check_attention(model: nn.Module, batch: Batch, packed: bool) -> None:
    """Check on the network itself that no place sees what follows it, nor, where packed, another sample.

    Neither is true of every architecture: encoders look ahead, state-space layers and attention without position ids
    look across samples. The state of torch's generators stays as it is. Raises UserError.
    """
    device = batch["input_ids"].device
    positions = torch.arange(8, device=device)[None] % 4 if packed else None

    def logits(changed: slice) -> torch.Tensor:
        ids = torch.zeros(1, 8, dtype=torch.long, device=device)
        ids[:, changed] = 1
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(0)
            with torch.compiler.set_stance("force_eager"):
                return forward(model, ids, positions).float()

    try:
        usual = logits(slice(0))
        if usual.untyped_storage().device.type == "meta":  # without values, as `scaletrain plan` has them
            return
        causal = _same(usual[:, :7], logits(slice(7, 8))[:, :7])
        isolated = not packed or _same(usual[:, 4:], logits(slice(4))[:, 4:])
    except TypeError as error:
        if "position_ids" not in str(error):
            raise
        isolated = False
    if not isolated:
        raise UserError("data.packing: the samples of a pack would see each other in this network. Set it to false.")
    if not causal:
        raise UserError("networks.model sees the tokens that it is to predict: it is an encoder, no causal network.")


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-5 * a.abs().max())


def _prompts(tokens: Tokens) -> Sequence[list[int]]:
    """Take prompts evenly from the data: what comes before the first learned token, or the beginning of a passage."""
    if tokens.marks is None:
        starts = range(0, len(tokens.ids), max(1, len(tokens.ids) // PROMPTS))[:PROMPTS]
        return [tokens.ids[s : s + PROMPT_TOKENS].tolist() for s in starts]
    rows = range(0, len(tokens.lengths), max(1, len(tokens.lengths) // PROMPTS))[:PROMPTS]
    found = []
    for row in rows:
        a, b = tokens.offsets[row : row + 2].tolist()
        learned = tokens.marks[a:b].nonzero()[0]
        if len(learned):
            found.append(tokens.ids[a : a + int(learned[0])].tolist())
    return found
