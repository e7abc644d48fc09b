"""Causal language models: next-token cross-entropy on documents, prompts with completions, or chats.

L = Σ -log p(x_{t+1} | x_≤t) over the learned tokens, divided by their number in the global batch.
Shapes: B sequences (or packs), T positions, V tokens of the vocabulary.
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

from scaletrain.config import NetworkSpec, Recipe, Strict
from scaletrain.data import formats
from scaletrain.data.cache import content_key
from scaletrain.data.text import IGNORE, Blocks, LanguageDataset, Samples, Tokens, encode, tokenise
from scaletrain.data.tokenizers import (
    TokenizerConfig,
    check_vocabulary,
    filler,
    identity,
    load_tokenizer,
    special_ids,
    train_tokenizer,
)
from scaletrain.errors import UserError, did_you_mean
from scaletrain.explain import decode
from scaletrain.objectives import base
from scaletrain.objectives.base import Networks, Request
from scaletrain.player import Batch, Term, Turn

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerFast

    from scaletrain.data.sources import Rows

FORMAT_FILE = "data_format.json"
VOCABULARY = 4096
"""Tokens of a tokenizer that is trained here, when neither it nor the network says how many."""
TOKENIZER_ROWS = 20_000
"""Rows of a stream that a tokenizer is trained on."""
PROMPTS, PROMPT_TOKENS = 64, 16
"""How many prompts are taken from the data, and their length where the data has no prompts."""


class SamplingConfig(Strict):
    """How texts are continued."""

    max_new_tokens: int | None = Field(None, ge=1)
    """By default 64, or half of the network's positions where that is less."""
    temperature: float = Field(0.8, ge=0)
    """0 takes the most likely token."""
    top_k: int | None = Field(None, ge=1)
    top_p: float = Field(1.0, gt=0, le=1)


class Config(Strict):
    """Options of the objective."""

    format: formats.FormatName | None = None
    """text, completion or chat; by default what the columns tell."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target that is spread over the whole vocabulary (Szegedy et al., 2016), in training only."""
    sampling: SamplingConfig = SamplingConfig()


@final
class Objective(base.Objective[Config]):
    """Next-token prediction by one network, `model`."""

    throughput: ClassVar[str] = "tokens"
    windowed: ClassVar[bool] = True
    data_keys: ClassVar[frozenset[str]] = frozenset({"seq_len", "packing"})

    def __init__(self, config: Config, recipe: Recipe):
        super().__init__(config, recipe)
        self.spec = recipe.networks.get("model", NetworkSpec())
        if not (self.spec.path or self.spec.source or "model_type" in self.spec.config):
            raise UserError("networks.model: give the `path` of a pretrained network, or a `config` with a model_type.")
        self.tokenizer: PreTrainedTokenizerFast | None = None
        self._format: formats.FormatName = config.format or "text"
        self.prompts: list[list[int]] = []
        self._checked = False

    def prepare(self, train: Rows, eval: Rows | None) -> None:
        """Find the format and the tokenizer, and check the network. Raises UserError that names the key or row."""
        if self.recipe.data.seq_len is None:
            raise UserError("data.seq_len is missing: say how many tokens a sequence may have.")
        self._format = formats.detect(train, self.config.format)
        self.tokenizer = self.tokenizer or self._find_tokenizer(train)
        self.check_network(self.recipe.data.seq_len)
        # One of its own: a tokenizer must not be used by two threads at a time.
        self._language = copy.deepcopy(formats.language_format(self._format, self.tokenizer))

    def examples(self, rows: Rows, training: bool, window: bool = False) -> LanguageDataset:
        """Tokenise, mask, and cut or pack to `data.seq_len`. Raises UserError that names the row."""
        seq_len, packing = self.recipe.data.seq_len, self.recipe.data.packing
        assert self.tokenizer is not None
        assert seq_len is not None
        tokens = encode(rows, self._language) if window else tokenise(rows, self._language)
        fill = filler(self.tokenizer)
        found: LanguageDataset
        if self._format == "text":
            found = Blocks(tokens, seq_len, fill, isolated=packing, empty=window)
        else:
            found = Samples(tokens, rows, seq_len, fill, packed=packing, empty=window)
        if not window:
            self.prompts = list(_prompts(tokens))
        return found

    def facts(self) -> dict[str, str]:
        """Return the tokenizer's."""
        assert self.tokenizer is not None
        return {"the tokenizer": content_key(identity(self.tokenizer))}

    def _find_tokenizer(self, train: Rows) -> PreTrainedTokenizerFast:
        given = self.config.tokenizer
        if given.path:
            return load_tokenizer(given.path, "objective.tokenizer.path")
        if self.spec.path and not given.vocab_size:
            return load_tokenizer(self.spec.path, "networks.model.path")
        if self.spec.source and not given.vocab_size:
            raise UserError(f"{self.spec.source} has no tokenizer: set objective.tokenizer.path.")
        size = given.vocab_size or self.spec.config.get("vocab_size", VOCABULARY)
        texts = formats.texts(train.sample(TOKENIZER_ROWS) if train.streaming else train, self._format)
        return train_tokenizer(texts, size, f"{self._format} {train.fingerprint}")

    def check_network(self, seq_len: int) -> None:
        """Check the network's embeddings, of tokens and of positions, before a weight is read."""
        from scaletrain.networks import causal_lm

        spec, tokenizer = self.networks()["model"], self.tokenizer
        assert tokenizer is not None
        if spec.source:
            return  # its weights fit its configuration, and its tokenizer came with it
        config = decode(causal_lm.Config, spec.config, "networks.model.config")
        settings = (
            causal_lm.read_config(spec.path, config) if spec.path else causal_lm.new_config(config)
        ).get_text_config()
        check_vocabulary(tokenizer, settings.vocab_size, "networks.model")
        limit = getattr(settings, "max_position_embeddings", None)
        wanted = self.config.sampling.max_new_tokens
        if limit and wanted and wanted >= limit:
            raise UserError(
                f"objective.sampling.max_new_tokens={wanted}: the network has {limit} positions in all. Lower it."
            )
        if limit and seq_len > limit:
            raise UserError(
                f"data.seq_len={seq_len}: the network has {limit} positions. Lower it, or, for a new network, raise "
                "networks.model.config.max_position_embeddings."
            )

    def restore(self, folders: Mapping[str, Path]) -> None:
        """Take the tokenizer and the format of prompts from the network's folder."""
        if "model" in folders:
            self.tokenizer = load_tokenizer(str(folders["model"]), "the network's folder")
            written = folders["model"] / FORMAT_FILE
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
        return {"model": spec}

    def counts(self, turn: Turn, batch: Batch) -> dict[str, int]:
        """Return the learned tokens, `targets`, and the real ones, `tokens`."""
        return {"targets": int((batch["labels"] != IGNORE).sum()), "tokens": int(batch["lengths"].sum())}

    def loss(self, turn: Turn, networks: Networks, batch: Batch) -> dict[str, Term]:
        """Return the sum of the cross-entropy over the learned tokens."""
        if not self._checked:
            check_attention(networks["model"], batch, self.recipe.data.packing)
            self._checked = True
        return self._cross_entropy(networks["model"], batch, self.config.label_smoothing)

    def evaluate(self, networks: Networks, batch: Batch) -> dict[str, Term]:
        """Return the loss without smoothing."""
        return self._cross_entropy(networks["model"], batch, 0.0)

    def conclude(self, metrics: dict[str, float]) -> dict[str, float]:
        """Add the perplexity, e to the loss."""
        return metrics | {"perplexity": math.exp(metrics["loss"]) if metrics["loss"] < 700 else math.inf}

    def _cross_entropy(self, model: nn.Module, batch: Batch, smoothing: float) -> dict[str, Term]:
        logits = forward(model, batch["input_ids"], batch.get("position_ids"))
        total = F.cross_entropy(
            logits.flatten(0, 1).float(),
            batch["labels"].flatten(),
            ignore_index=IGNORE,
            reduction="sum",
            label_smoothing=smoothing,
        )
        return {"loss": Term(total, per="targets")}

    def sample(self, networks: Networks, request: Request) -> base.Samples:
        """Continue prompts: those of the request, else some of the data, else nothing but the end of text."""
        tokenizer = self.tokenizer
        assert tokenizer is not None
        options = {**self.config.sampling.model_dump(), **request.options}
        for key in options:
            if key not in SamplingConfig.model_fields:
                raise UserError(
                    f"no sampling option is called `{key}`.{did_you_mean(key, SamplingConfig.model_fields)}"
                )
        how = decode(SamplingConfig, options, "sampling")
        fmt: Any = formats.language_format("completion" if self._format == "text" else self._format, tokenizer)
        prompts = [fmt.prompt(p) for p in request.prompts] or self.prompts or [[]]
        start = next(i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id, 0) if i is not None)
        count = max(request.count, len(request.prompts))
        prompts = [prompts[i * len(prompts) // count] or [start] for i in range(count)]
        ids = generate(networks["model"], prompts, how, request.generator, filler(tokenizer), tokenizer.eos_token_id)
        return base.Samples(texts=tokenizer.batch_decode(ids, skip_special_tokens=True))


def forward(model: nn.Module, input_ids: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
    """Return logits (B, T, V). Padding is at the right, so that no mask is needed; positions isolate the samples."""
    positions = {} if position_ids is None else {"position_ids": position_ids}
    logits: torch.Tensor = model(input_ids=input_ids, use_cache=False, **positions).logits
    return logits


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


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[list[int]],
    how: SamplingConfig,
    generator: torch.Generator,
    fill: int,
    end: int | None,
    batch: int = 16,
) -> list[list[int]]:
    """Continue prompts, a batch at a time; returns prompt and continuation of each, without what follows the end.

    Drawn from `generator` alone; torch's global generators stay as they are. Prompts that leave too few positions for
    the continuation lose their beginning.
    """
    from transformers import GenerationConfig

    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    new = how.max_new_tokens or min(64, limit // 2 if limit else 64)
    if limit and new >= limit:
        raise UserError(f"sampling.max_new_tokens={new}: the network has {limit} positions in all.")
    room = limit - new if limit else None
    drawn = {"temperature": how.temperature, "top_k": how.top_k or 0, "top_p": how.top_p} if how.temperature else {}
    settings = GenerationConfig(max_new_tokens=new, do_sample=bool(drawn), pad_token_id=fill, eos_token_id=end, **drawn)
    device = generator.device
    out: list[list[int]] = []
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator, device=device)))
        for first in range(0, len(prompts), batch):
            some = [p[-room:] if room else p for p in prompts[first : first + batch]]
            width = max(map(len, some))
            ids = torch.tensor([[fill] * (width - len(p)) + p for p in some], device=device)
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in some], device=device)
            done = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
            for prompt, row in zip(some, done[:, width:].tolist(), strict=True):
                out.append(prompt + (row[: row.index(end)] if end in row else row))
    return out


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
