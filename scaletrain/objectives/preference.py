"""A language model that learns which answers are preferred: DPO, IPO, ORPO and SimPO on pairs, KTO on judged answers.

log π(y|x) = Σ log p(y_t | x, y_<t) over the tokens of an answer, for the network and, where the loss has one, for the
reference: what the network was before. See `preference_losses` for what is made of them.
Shapes: S answers, P = S / 2 pairs, K learned tokens, V tokens of the vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from scaletrain.config import NetworkSpec, Recipe, Strict
from scaletrain.data import preference_contract, preferences
from scaletrain.data.contract import Inspection
from scaletrain.data.dataset import Dataset
from scaletrain.data.formats import FormatName, language_format
from scaletrain.data.preferences import MISMATCHED, Answered, Preferences, Sequences, Shape
from scaletrain.data.text import encode, tokenise
from scaletrain.data.tokenizers import (
    TokenizerConfig,
    ensure_chat_template,
    filler,
    leading,
    load_tokenizer,
    read_chat_template,
)
from scaletrain.errors import UserError
from scaletrain.evaluate.generation import SamplingConfig
from scaletrain.networks import heads
from scaletrain.objectives import causal_lm
from scaletrain.objectives._speaking import Speaking
from scaletrain.objectives.base import Networks
from scaletrain.objectives.causal_lm import check_attention
from scaletrain.objectives.preference_losses import KTO, Loss, Pairwise, signed
from scaletrain.player import Batch, Term, Turn

if TYPE_CHECKING:
    from scaletrain.data.sources import Rows

_KEEPS = frozenset(("lora", "rslora", "dora", "vera", "ia3", "prompt"))
"""Adapters that leave the weights under them as they are, so that the network without one is what it was before."""


class Config(Strict):
    """Options of the objective."""

    loss: Loss
    tokenizer: TokenizerConfig = TokenizerConfig()
    chat_template: str | None = None
    """A Jinja file, in place of the tokenizer's own chat template."""
    template_options: dict[str, Any] = Field(default_factory=dict)
    """Values for the chat template, such as {enable_thinking: false}."""
    max_lost: float = Field(0.05, ge=0, le=1)
    """Share of the rows that may be left out: an answer is empty or longer than data.seq_len, or both are the same."""
    sampling: SamplingConfig = SamplingConfig()


@final
class Objective(Speaking[Config]):
    """Preferences for one network, `model`, perhaps against a frozen one, `reference`.

    Where a loss has a reference and the recipe names none, it is the model without its adapter; of a model that is
    trained whole, or goes on from another network of a run, a frozen copy of what it begins with.
    """

    def __init__(self, config: Config, recipe: Recipe):
        super().__init__(config, recipe)
        self.spec = recipe.networks.get("model", NetworkSpec())
        if not (self.spec.path or self.spec.source):
            raise UserError(
                "networks.model: give the `path` of a trained network, or `from`: it already answers prompts."
            )
        if config.tokenizer.vocab_size:
            raise UserError("objective.tokenizer.vocab_size: the network has a tokenizer already. Leave it out.")
        self._check_reference()
        self.surveys = isinstance(config.loss, KTO)
        self.language = causal_lm.Objective(self._config_of(None), recipe)
        self._checked = False

    def _config_of(self, chat: bool | None) -> causal_lm.Config:
        name: FormatName | None = None if chat is None else "chat" if chat else "completion"
        own = {key: getattr(self.config, key) for key in ("tokenizer", "template_options", "sampling")}
        return causal_lm.Config(format=name, **own)

    def _check_reference(self) -> None:
        given = self.recipe.networks.get("reference")
        if given is None:
            return
        if not self.config.loss.refers:
            raise UserError(f"networks.reference: {self.config.loss.type} has no reference. Leave it out.")
        if not given.frozen:
            raise UserError("networks.reference must have `frozen: true`: it stays what the model was before.")

    # --- data ---------------------------------------------------------------------------------------------------------

    def prepare(self, train: Rows, eval: Rows | None) -> None:
        """Find the form of the rows and the tokenizer, and check the network. Raises UserError."""
        if self.recipe.data.seq_len is None:
            raise UserError("data.seq_len is missing: say how many tokens a prompt and its answer may have.")
        tokenizer = self.language.tokenizer
        path = self.config.tokenizer.path or self.spec.path
        if tokenizer is None and path is None:
            raise UserError(f"{self.spec.source} has no tokenizer: set objective.tokenizer.path.")
        if tokenizer is None:
            tokenizer = load_tokenizer(str(path), "networks.model.path")
        chat = self._detect(train)
        self.language = causal_lm.Objective(self._config_of(chat), self.recipe)
        self.language.tokenizer = tokenizer
        if self.config.chat_template:
            tokenizer.chat_template = read_chat_template(self.config.chat_template)
        if chat:
            ensure_chat_template(tokenizer)
        # One of its own: a tokenizer must not be used by two threads at a time.
        own, options = copy.deepcopy(tokenizer), self.config.template_options
        if chat:
            self._written = language_format("chat", own, "last", options)
        else:
            self._written = language_format("completion", own)
        self.language.check_network(self.recipe.data.seq_len)
        self._check_vocabulary()

    def _detect(self, rows: Rows) -> bool:
        """Check the columns. Returns whether the rows are chats rather than texts."""
        judged = isinstance(self.config.loss, KTO)
        answers = ("completion",) if judged else ("chosen", "rejected")
        if judged and "label" not in rows.columns and "chosen" in rows.columns:
            raise UserError(
                "these rows have pairs, `chosen` and `rejected`, but kto learns from answers that were judged one by "
                "one: `prompt`, `completion` and `label`. Take another objective.loss.type, such as dpo."
            )
        if not judged and "chosen" not in rows.columns and "label" in rows.columns:
            raise UserError(
                f"these rows have answers with a `label`, but {self.config.loss.type} learns from pairs, `chosen` and "
                "`rejected`. Take objective.loss.type=kto."
            )
        for column in answers:
            rows.require(column, "an answer")
        if judged:
            rows.require("label", "whether the answer was desirable")
            rows.require("prompt", "what the answer is to")
        self._prompted = "prompt" in rows.columns
        first = rows.row(0)
        chat = any(isinstance(first[c], list) for c in (*answers, *(("prompt",) if self._prompted else ())))
        if not (chat or self._prompted):
            rows.require("prompt", "what the answers are to; without it, they must be lists of messages")
        return chat

    def _check_vocabulary(self) -> None:
        """Raise UserError when a reference that is read from elsewhere has other tokens."""
        assert self.language.tokenizer is not None
        reference = self.networks().get("reference")
        if reference is None or reference.path in (None, self.spec.path):
            return
        theirs = load_tokenizer(str(reference.path), "networks.reference.path")
        if theirs.get_vocab() != self.language.tokenizer.get_vocab():
            raise UserError(
                f"networks.reference.path: the tokens of `{reference.path}` are not those of the model, so that "
                "probabilities cannot be compared. Take the network that the model begins with."
            )

    def examples(self, rows: Rows, training: bool, window: bool = False) -> Preferences:
        """Tokenise, leave out what cannot be learned from, and cut or pack. Raises UserError that names the row."""
        tokenizer, seq_len = self.language.tokenizer, self.recipe.data.seq_len
        assert tokenizer is not None
        assert seq_len is not None
        shape = Shape(seq_len, filler(tokenizer), self.recipe.data.packing, tuple(leading(tokenizer)))
        sequences = [Sequences.of(encode(rows, fmt) if window else tokenise(rows, fmt)) for fmt in self._formats()]
        if isinstance(self.config.loss, KTO):
            labels = preferences.judgements(rows.take(["label"], np.arange(len(rows)))["label"], rows)
            (own,) = sequences
            found = preferences.ratings(own, labels, rows, shape, self.recipe.seed, training, quiet=window)
        else:
            chosen, rejected = sequences
            found = preferences.pairs(chosen, rejected, rows, shape, quiet=window)
        if not window:
            self.language.prompts = found.prompts(causal_lm.PROMPTS)
        return found

    def _formats(self) -> list[Answered]:
        """Return how each answer of a row is read."""
        answers = ("completion",) if isinstance(self.config.loss, KTO) else ("chosen", "rejected")
        others = [None] * len(answers) if self._prompted else answers[::-1]
        chat, written = self.language.config.format == "chat", self._written
        return [Answered(written.tokenizer, written, a, chat, o) for a, o in zip(answers, others, strict=True)]

    def inspect(self, dataset: Dataset) -> Inspection:
        """Return the data contract."""
        assert isinstance(dataset, Preferences)
        batch = self.recipe.train.micro_batch or self.recipe.train.global_batch
        found = self.language.embeddings, batch, self.config.max_lost
        return preference_contract.inspect(dataset, self._formats(), self._written.tokenizer, *found)

    # --- networks -----------------------------------------------------------------------------------------------------

    def networks(self) -> dict[str, NetworkSpec]:
        """Return the network, and the reference where there is a separate one."""
        found = self.language.networks()
        model = found["model"]
        given = self.recipe.networks.get("reference")
        if not self.config.loss.refers or (given is None and self._without_adapter()):
            return found
        if given is None:
            # An adapter that goes on from one of another network is folded in.
            alone = {"frozen": True} | ({"adapter": None} if "model" in self.origins else {})
            return found | {"reference": model.model_copy(update={**alone, **self._begun()})}
        where = {} if given.path or given.source else self._begun()
        return found | {"reference": given.model_copy(update={"type": given.type or model.type, **where})}

    def _begun(self) -> dict[str, Any]:
        """Return where the weights are that the model begins with."""
        origin = self.origins.get("model")
        return {"path": None, "source": origin} if origin else {"path": self.spec.path, "source": self.spec.source}

    def _without_adapter(self) -> bool:
        """Say whether the model is the reference where its adapter is off: a new one, over weights that it keeps."""
        adapter = self.spec.adapter
        return adapter is not None and adapter.type in _KEEPS and not adapter.path and "model" not in self.origins

    # --- losses -------------------------------------------------------------------------------------------------------

    def counts(self, turn: Turn, batch: Batch) -> dict[str, int]:
        """Return the pairs, or rows, the tokens of answers that are learned as they are, and the real positions."""
        tokens, answers = {"tokens": int(batch["lengths"].sum())}, batch["answers"]
        if isinstance(self.config.loss, KTO):
            return {"rows": len(answers), **tokens}
        return {"pairs": len(answers) // 2, "targets": int(answers[::2].sum()), **tokens}

    def survey(self, turn: Turn, networks: Networks, batch: Batch) -> dict[str, Term]:
        """Return how far the network is from the reference, by answers to other prompts."""
        ratios = self._ratios(networks, batch, MISMATCHED)
        return {"divergence": Term(ratios.sum(), "rows")}

    def loss(self, turn: Turn, networks: Networks, batch: Batch) -> dict[str, Term]:
        """Return the loss over pairs or rows, and figures."""
        if not self._checked:
            check_attention(networks["model"], batch, self.recipe.data.packing)
            self._checked = True
        if isinstance(self.config.loss, KTO):
            return self._judged(self.config.loss, networks, batch, batch["divergence"])
        return self._compared(self.config.loss, networks, batch)

    def evaluate(self, networks: Networks, batch: Batch) -> dict[str, Term]:
        """Return the same; the divergence that KTO has is that of this batch."""
        if isinstance(self.config.loss, KTO):
            divergence = self._ratios(networks, batch, MISMATCHED).mean()
            return self._judged(self.config.loss, networks, batch, divergence)
        return self._compared(self.config.loss, networks, batch)

    def _compared(self, loss: Pairwise, networks: Networks, batch: Batch) -> dict[str, Term]:
        reference = self._reference(networks, batch).view(-1, 2) if loss.refers else None
        logps = _answer_logps(networks["model"], batch).view(-1, 2)
        losses, rewards = loss(logps, batch["answers"].view(-1, 2), reference)
        told = {"accuracy": (rewards[:, 0] > rewards[:, 1]).float(), "margin": rewards[:, 0] - rewards[:, 1]}
        for i, answer in enumerate(("chosen", "rejected")):
            told |= {f"reward/{answer}": rewards[:, i], f"logp/{answer}": logps[:, i]}
        figures = {name: Term(values.detach().sum(), "pairs", 0.0) for name, values in told.items()}
        if not loss.likelihood:
            return {"loss": Term(losses.sum(), "pairs"), **figures}
        likelihood = Term(-logps[:, 0].sum(), "targets", loss.likelihood)
        return {"preference": Term(losses.sum(), "pairs"), "sft": likelihood, **figures}

    def _judged(self, loss: KTO, networks: Networks, batch: Batch, divergence: Tensor) -> dict[str, Term]:
        desirable, ratios = batch["labels"], self._ratios(networks, batch)
        value = signed(ratios.detach() - divergence.clamp(min=0), desirable)
        told = {
            "accuracy": (value > 0).float(),
            "margin": loss.beta * signed(ratios.detach(), desirable),
            "divergence": divergence.clamp(min=0).expand(len(ratios)),
        }
        figures = {name: Term(values.sum(), "rows", 0.0) for name, values in told.items()}
        return {"loss": Term(loss(ratios, desirable, divergence).sum(), "rows"), **figures}

    def _ratios(self, networks: Networks, batch: Batch, group: str = "") -> Tensor:
        """Return log π/π_ref of each answer: (S,)."""
        reference = self._reference(networks, batch, group)
        return _answer_logps(networks["model"], batch, group) - reference

    @torch.no_grad()
    def _reference(self, networks: Networks, batch: Batch, group: str = "") -> Tensor:
        """Return log-probabilities of answers by the reference: (S,)."""
        if "reference" in networks:
            return _answer_logps(networks["reference"], batch, group)
        with _adapter_off(networks["model"]):
            return _answer_logps(networks["model"], batch, group)


def _answer_logps(model: nn.Module, batch: Batch, group: str = "") -> Tensor:
    """Return the log-probability of each answer: (S,). Only the learned places come to logits, some at a time."""
    names = [name for name in ("input_ids", "position_ids") if group + name in batch]
    inputs = {name: batch[group + name] for name in names}
    learned, targets, segments = (batch[group + name] for name in ("learned", "targets", "segments"))
    logps = heads.reduce(model, inputs, learned, _token_logps, (targets,), per_token=True)
    return logps.new_zeros(len(batch[group + "answers"])).index_add(0, segments, logps)


def _token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """Return log p of targets (K,) by logits (K, V): (K,)."""
    return -F.cross_entropy(logits, targets, reduction="none")


@contextmanager
def _adapter_off(network: nn.Module) -> Iterator[None]:
    """Have a network, wrapped or not, be what it was before its adapter, and without dropout."""
    adapted: Any = next(module for module in network.modules() if hasattr(module, "disable_adapter"))
    training = network.training
    network.eval()
    try:
        with adapted.disable_adapter():
            yield
    finally:
        network.train(training)
