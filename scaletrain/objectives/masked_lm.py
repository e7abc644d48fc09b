"""Masked language models: tell the tokens that are hidden, from all the others (Devlin et al., 2019; Liu et al., 2019).

L = Σ -log p(x_t | what is seen of x) over hidden tokens, divided by their number in the global batch.
Shapes: B texts, T positions, V tokens of the vocabulary.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, ClassVar, final

import torch
import torch.nn.functional as F
from pydantic import Field

from scaletrain.data.masked import Alphabet, MaskedTexts, Passages
from scaletrain.data.text import IGNORE, encode, tokenise
from scaletrain.errors import UserError
from scaletrain.objectives._text import TextConfig, TextObjective, encoded
from scaletrain.objectives.base import Networks, Request, Samples
from scaletrain.player import Batch, Term, Turn

if TYPE_CHECKING:
    from scaletrain.data.sources import Rows

MASK = "<|mask|>"
"""Of a tokenizer that is trained here."""


class Config(TextConfig):
    """Options of the objective."""

    share: float = Field(0.15, gt=0, lt=1)
    """Of the tokens that are hidden: of these, 80% are seen as a mask, 10% as a random token, 10% as they are."""
    whole_words: bool = False
    """Hide all tokens of a word together (Cui et al., 2021)."""
    blocks: bool = True
    """Texts are put one after the other and cut into blocks of `data.seq_len`; else each is an example by itself."""


@final
class Objective(TextObjective[Config]):
    """Hidden tokens, told by one network, `model`."""

    takes_prompts: ClassVar[bool] = True
    kind: ClassVar[str] = "masked_lm"
    throughput: ClassVar[str] = "tokens"

    def prepare(self, train: Rows, eval: Rows | None) -> None:
        """Find the tokenizer and check the network. Raises UserError that names the key."""
        train.require("text", "the text")
        if self.config.blocks and self.recipe.data.seq_len is None:
            raise UserError("data.seq_len is missing: say how many tokens a block has, or set objective.blocks=false.")
        self.tokenizer = self.find_tokenizer(train, "text")
        if self.tokenizer.mask_token_id is None:
            if not self.config.tokenizer.vocab_size:
                raise UserError("the tokenizer has no mask token: its network does not learn by masks. Take another.")
            self.tokenizer.add_special_tokens({"mask_token": MASK})
        # One of its own: a tokenizer must not be used by two threads at a time.
        self._passages = Passages(copy.deepcopy(self.tokenizer), self.config.whole_words)
        self._alphabet, self._seq_len = Alphabet.of(self._passages.tokenizer), self.check_network()

    def examples(self, rows: Rows, training: bool, window: bool = False) -> MaskedTexts:
        """Tokenise, and cut into blocks or rows. Raises UserError that names the row."""
        tokens, config = (encode if window else tokenise)(rows, self._passages), self.config
        how = (self._seq_len, config.share, config.blocks, config.whole_words)
        return MaskedTexts(tokens, rows, self._alphabet, *how, empty=window)

    def counts(self, turn: Turn, batch: Batch) -> dict[str, int]:
        """Return the hidden tokens, `targets`, and the real ones, `tokens`."""
        return {"targets": int((batch["labels"] != IGNORE).sum()), "tokens": int(batch["attention_mask"].sum())}

    def loss(self, turn: Turn, networks: Networks, batch: Batch) -> dict[str, Term]:
        """Return the cross-entropy over hidden tokens, and how many of these are right, for the log."""
        logits, labels = networks["model"](**encoded(batch)).logits, batch["labels"]
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum")
        right = (logits.detach().argmax(-1) == labels).sum()
        return {"loss": Term(loss, per="targets"), "accuracy": Term(right, per="targets", weight=0.0)}

    def conclude(self, metrics: dict[str, float]) -> dict[str, float]:
        """Add the perplexity of hidden tokens, e to the loss."""
        return metrics | {"perplexity": math.exp(metrics["loss"]) if metrics["loss"] < 700 else math.inf}

    def sample(self, networks: Networks, request: Request) -> Samples | None:
        """Put the likeliest token in the place of each mask of the request's texts; nothing is drawn without them."""
        if not request.prompts:
            return None
        assert self.tokenizer is not None
        batch = self.batch_of(request.prompts, networks["model"], request.generator.device)
        with torch.no_grad():
            best = networks["model"](**batch).logits.argmax(-1)
        ids = torch.where(batch["input_ids"] == self.tokenizer.mask_token_id, best, batch["input_ids"])
        return Samples(texts=self.tokenizer.batch_decode(ids.tolist(), skip_special_tokens=True))
