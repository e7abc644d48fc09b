"""Distillation of causal language models: a student learns what a frozen teacher says at every learned token.

L = Σ a · (-log q(x_{t+1})) + (1 - a) T² · D(p, q) over the learned tokens, divided by their number in the global batch;
p = softmax(teacher's logits / T), q = softmax(student's logits / T) (Hinton et al., 2015, eq. 1 and section 2), D one
of `_divergence`. To it come, where asked for, the squared differences of hidden states (Jiao et al., 2020, "TinyBERT",
eq. 8) and the divergences of attentions (Wang et al., 2020, "MiniLM", section 3.1), over the real tokens. On-policy,
some windows are replaced by the student's own continuations of their prompts (Agarwal et al., 2024, algorithm 1).

Shapes: B sequences (or packs), T positions, K learned tokens, H width, A heads, V tokens of the vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator

from scaletrain.config import NetworkSpec, PlayerSpec, Recipe, Strict
from scaletrain.data.contract import Inspection
from scaletrain.data.dataset import Dataset
from scaletrain.data.text import IGNORE
from scaletrain.data.tokenizers import TokenizerConfig, check_vocabulary, filler, load_tokenizer
from scaletrain.data.top_k import TopK, WithTopK
from scaletrain.errors import UserError
from scaletrain.explain import decode
from scaletrain.networks import heads
from scaletrain.networks._positions import beside, left, virtual_tokens
from scaletrain.networks._states import States, before_head, reduce_with
from scaletrain.objectives import causal_lm
from scaletrain.objectives._divergence import Kind, bucketed, divergence
from scaletrain.objectives._identity import identity
from scaletrain.objectives._on_policy import batch_of, continued, prompts_of
from scaletrain.objectives._speaking import Speaking
from scaletrain.objectives.base import Ahead, Networks, ahead_of, completed
from scaletrain.player import Batch, Term, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from scaletrain.data.sources import Rows


class MatchConfig(Strict):
    """Layers of the student that are to be like layers of the teacher."""

    layers: dict[int, int] = Field(min_length=1)
    """Student's to teacher's. Blocks count from 1; 0 is the embeddings, which have hidden states alone."""
    weight: float = Field(1.0, gt=0)


class CacheConfig(Strict):
    """The teacher's most likely tokens, kept on disk."""

    top_k: int = Field(64, ge=1)


class OnPolicyConfig(Strict):
    """The student's own continuations."""

    share: float = Field(gt=0, le=1)
    """Of the windows: λ of Agarwal et al., 2024."""
    max_new_tokens: int = Field(128, ge=1)
    temperature: float = Field(1.0, gt=0)


class Config(causal_lm.LanguageConfig):
    """Options of the objective."""

    divergence: Kind = "forward_kl"
    beta: float | None = Field(None, gt=0, lt=1)
    """jsd: the teacher's part of the mixture; by default 0.5."""
    temperature: float = Field(1.0, gt=0)
    hard: float = Field(0.0, ge=0, lt=1)
    """Part of the cross-entropy with the data, `a`."""
    hidden: MatchConfig | None = None
    attention: MatchConfig | None = None
    cache: CacheConfig | None = None
    """The teacher is asked once, before the training; what it says of other tokens is taken together."""
    on_policy: OnPolicyConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _share(cls, values: Any) -> Any:
        """Let a number stand for the share of `on_policy`."""
        if isinstance(values, dict) and isinstance(values.get("on_policy"), (int, float)):
            return {**values, "on_policy": {"share": values["on_policy"]}}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.beta is not None and self.divergence != "jsd":
            raise ValueError(f"beta is for divergence: jsd, not for {self.divergence}")
        for key in ("hidden", "attention", "on_policy"):
            if self.cache and getattr(self, key):
                raise ValueError(f"cache holds what the teacher says of the data, and {key} asks it for more: take one")
        if self.on_policy and self.hard:
            raise ValueError("on_policy with hard would have the student learn its own tokens as if they were data")
        if self.attention and 0 in {*self.attention.layers, *self.attention.layers.values()}:
            raise ValueError("attention.layers: layer 0 is the embeddings, which attend to nothing")
        return self

    @property
    def states(self) -> list[str]:
        """What is asked of the networks beside their logits, by the names of `heads.STATES`."""
        asked = {"hidden_states": self.hidden, "attentions": self.attention}
        return [name for name in heads.STATES if asked[name]]


@final
class Objective(Speaking[Config]):
    """A `student`, a frozen `teacher`, and a `projection` of hidden states where their widths differ.

    What concerns the student and the data alone is the objective of a causal language model.
    """

    turns = (Turn("train", "student"),)

    def __init__(self, config: Config, recipe: Recipe):
        super().__init__(config, recipe)
        own = {name: getattr(config, name) for name in causal_lm.LanguageConfig.model_fields}
        self.language = causal_lm.Objective(causal_lm.Config(**own), recipe, "student")
        self.teacher = recipe.networks.get("teacher", NetworkSpec())
        if not self.teacher.frozen or self.teacher.source is self.teacher.path is None:
            raise UserError("networks.teacher must have `frozen: true`, and `from` or `path` for its weights")
        self.enriching = config.on_policy is not None
        if self.enriching and virtual_tokens(self.language.spec.adapter):
            raise UserError(
                "objective.on_policy: texts are not drawn from a student whose adapter is a prompt: take another "
                "networks.student.adapter.type, such as lora, or leave on_policy out."
            )
        self._projects = "projection" in (recipe.players.get("student", PlayerSpec()).networks or ())
        if self._projects and not config.hidden:
            raise UserError("players.student.networks: `projection` is for objective.hidden, which is not given.")
        self._folders: Mapping[str, Path] = {}
        self._vocabulary = 0  # embeddings may be padded beyond it, by each network in its own way
        self._widths = (0, 0)
        self._kept: list[TopK] = []
        self._checked: set[str] = set()

    # --- before the training ------------------------------------------------------------------------------------------

    def restore(self, folders: Mapping[str, Path]) -> None:
        """Take the tokenizer and the format from the student's folder, and remember where the networks stand."""
        self._folders = folders
        super().restore(folders)

    def prepare(self, train: Rows, eval: Rows | None) -> None:
        """Find the tokenizer and the format, and hold both networks' settings against each other. Raises UserError."""
        if self.config.cache and train.streaming:
            raise UserError("objective.cache needs data whose rows have numbers; these stream. Set stream to false.")
        spoken, new = self._tokenizer_of_teacher(), not (self.language.spec.path or self.language.spec.source)
        if new and spoken and self.config.tokenizer == TokenizerConfig():
            self.language.tokenizer = spoken
        self.language.prepare(train, eval)
        if self.config.on_policy and self.language._format == "text":
            raise UserError("objective.on_policy continues prompts: give rows with prompts and completions, or chats.")
        if spoken:
            check_agreement(self.tokenizer, spoken)
        self._vocabulary = 1 + max(self.tokenizer.get_vocab().values())
        if self.config.cache and self.config.cache.top_k > self._vocabulary:
            raise UserError(f"objective.cache.top_k: there are {self._vocabulary:,} tokens in all.")
        self._check_networks()
        self._kept = []

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The one of both networks."""
        assert self.language.tokenizer is not None
        return self.language.tokenizer

    def _tokenizer_of_teacher(self) -> PreTrainedTokenizerFast | None:
        """Return it, where the teacher came with one."""
        place = self._folders.get("teacher") if self.teacher.source else self.teacher.path
        if place is None or (Path(place).is_dir() and not (Path(place) / "tokenizer.json").exists()):
            return None
        return load_tokenizer(str(place), "networks.teacher")

    def _check_networks(self) -> None:
        """Check vocabularies, positions, layers and widths, before a weight is read. Raises UserError."""
        student, teacher = (self._settings(name, spec) for name, spec in self._both().items())
        check_vocabulary(self.tokenizer, teacher.vocab_size, "networks.teacher")
        drawn = self.config.on_policy.max_new_tokens if self.config.on_policy else 0
        for name, settings in {"student": student, "teacher": teacher}.items():
            virtual = virtual_tokens(self._both()[name].adapter)
            limit = getattr(settings, "max_position_embeddings", None)
            limit = limit and left(limit, virtual)
            wanted = (self.recipe.data.seq_len or 0) + drawn
            if limit and wanted > limit:
                more = f" + objective.on_policy.max_new_tokens={drawn}" if drawn else ""
                raise UserError(
                    f"data.seq_len={self.recipe.data.seq_len}{more}: networks.{name} has {limit} positions"
                    f"{beside(virtual)}. Lower it."
                )
            self._check_layers(name, settings)
        self._widths = (student.hidden_size, teacher.hidden_size)
        if self.config.attention and student.num_attention_heads != teacher.num_attention_heads:
            raise UserError(
                f"objective.attention: the student has {student.num_attention_heads} heads and the teacher "
                f"{teacher.num_attention_heads}: give objective.hidden, or a student with as many."
            )
        if self.config.hidden and student.hidden_size != teacher.hidden_size and not self._projects:
            raise UserError(
                f"objective.hidden: the student's states are {student.hidden_size} wide and the teacher's "
                f"{teacher.hidden_size}: train a projection, with players.student.networks=[student, projection]."
            )

    def _check_layers(self, name: str, settings: Any) -> None:
        for key in ("hidden", "attention"):
            match: MatchConfig | None = getattr(self.config, key)
            pairs = match.layers if match else {}
            for layer in pairs if name == "student" else pairs.values():
                if not 0 <= layer <= settings.num_hidden_layers:
                    raise UserError(
                        f"objective.{key}.layers: the {name} has no layer {layer}: its blocks are 1 to "
                        f"{settings.num_hidden_layers}."
                    )
        attention = self._both()[name].config.get("attn_implementation")
        if self.config.attention and attention != "eager":
            raise UserError(
                f"objective.attention: only eager attention shows itself: set networks.{name}.config."
                "attn_implementation=eager."
            )

    def _both(self) -> dict[str, NetworkSpec]:
        teacher = self.teacher.model_copy(update={"type": self.teacher.type or "causal_lm"})
        return {**self.language.networks(), "teacher": teacher}

    def _settings(self, name: str, spec: NetworkSpec) -> Any:
        """Read a network's configuration, of its own folder or of the one that its adapter is for."""
        from scaletrain.networks import causal_lm as network

        config, path = decode(network.Config, spec.config, f"networks.{name}.config"), spec.path
        if spec.source:
            if name not in self._folders:
                raise UserError(f"networks.{name}.from: {spec.source} holds no weights: name what was trained there.")
            folder = self._folders[name]
            adapter = folder / "adapter_config.json"
            path = json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.exists() else str(folder)
        found = network.read_config(path, config) if path else network.new_config(config)
        return found.get_text_config()

    def examples(self, rows: Rows, training: bool, window: bool = False) -> Dataset:
        """Tokenise, mask, and cut or pack to `data.seq_len`. Raises UserError that names the row.

        Of a window, nothing that the teacher says is kept.
        """
        found = self.language.examples(rows, training, window)
        if self.config.cache is None or window:
            return found
        about = (*identity(self.teacher, self._folders.get("teacher")), self.recipe.train.precision)
        how = (self.config.temperature, self.config.cache.top_k, self._vocabulary)
        kept = TopK(found, self.recipe.evaluation_batch, *about, *how)
        self._kept.append(kept)
        return WithTopK(found, kept)

    def networks(self) -> dict[str, NetworkSpec]:
        """Return the student, the teacher unless what it says is kept, and the projection."""
        found = self._both()
        if self.config.cache:
            del found["teacher"]
        if self._projects:
            assert self.config.hidden is not None
            inputs, outputs = self._widths
            sizes = {"inputs": inputs, "outputs": outputs, "count": len(self.config.hidden.layers)}
            found["projection"] = completed(self.recipe, "projection", "projection", **sizes)
        return found

    def ahead(self) -> Ahead | None:
        """Have the teacher say, once, what is kept."""
        if self.config.cache is None:
            return None
        return ahead_of({"teacher": self._both()["teacher"]}, self._kept, self._ask)

    def _ask(self, networks: Networks, device: torch.device, kept: TopK, part: int) -> None:
        """Write what the teacher says of one part of a data set."""
        teacher = networks["teacher"]
        assert self.config.cache is not None
        found, lengths = [], []
        for indices in kept.calls(part):
            some = kept.dataset.collate([kept.dataset.at(i) for i in indices or [0]])
            batch = {name: tensor.to(device) for name, tensor in some.items()}
            self._check_attention({"teacher": teacher}, batch)
            values, logits_of, _ = before_head(teacher, _inputs(batch), batch["learned"])
            if indices:
                found += [self._most_likely(logits_of(v), self.config.cache.top_k) for v in values.split(_AT_ONCE)]
                lengths += some["labels"].ne(IGNORE).sum(1).tolist()
        kept.write(part, found, lengths)

    def _most_likely(self, logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        log_p = torch.log_softmax(logits[:, : self._vocabulary] / self.config.temperature, -1)
        ids = log_p.topk(k).indices
        return ids.cpu(), bucketed(log_p, ids).cpu()

    # --- in the loop --------------------------------------------------------------------------------------------------

    def enrich(
        self, turn: Turn, networks: Networks, window: Sequence[Batch], seeds: Sequence[int], device: torch.device
    ) -> list[Batch]:
        """Replace all micro-batches of a window, or none, by the student's continuations of their prompts."""
        how, student = self.config.on_policy, networks["student"]
        assert how is not None
        if torch.rand(()) >= how.share:
            return list(window)
        fill, training = filler(self.tokenizer), student.training
        ends = self.language.ends(student)
        student.eval()
        found: list[Batch] = []
        with torch.compiler.set_stance("force_eager"):
            for batch, seed in zip(window, seeds, strict=True):
                torch.manual_seed(seed)
                prompts = prompts_of(batch)
                lengths = how.max_new_tokens, how.temperature
                drawn = continued(student, prompts, *lengths, self._vocabulary, ends, fill, device)
                found.append(batch_of(prompts, drawn, ends, fill))
        student.train(training)
        return found

    def counts(self, turn: Turn, batch: Batch) -> dict[str, int]:
        """Return the learned tokens, `targets`, and the real ones, `tokens`."""
        return self.language.counts(turn, batch)

    def loss(self, turn: Turn, networks: Networks, batch: Batch) -> dict[str, Term]:
        """Return the sums over learned tokens, and over real ones what is to be matched; and figures."""
        self._check_attention({n: networks[n] for n in ("student", "teacher") if n in networks}, batch)
        return self._terms(networks, batch, figures=("divergence", "cross_entropy"))

    def evaluate(self, networks: Networks, batch: Batch) -> dict[str, Term]:
        """Return the loss and its parts, and how often both networks have the same token for the most likely one."""
        return self._terms(networks, batch, figures=("divergence", "cross_entropy", "agreement"))

    def conclude(self, metrics: dict[str, float]) -> dict[str, float]:
        """Add the perplexity, e to the cross-entropy."""
        found = metrics["cross_entropy"]
        return metrics | {"perplexity": math.exp(found) if found < 700 else math.inf}

    def inspect(self, dataset: Dataset) -> Inspection | None:
        """Return the data contract."""
        return self.language.inspect(dataset.dataset if isinstance(dataset, WithTopK) else dataset)

    def answers(self, held: Dataset) -> Dataset | None:
        """Return the rows whose answers are compared."""
        return self.language.answers(held.dataset if isinstance(held, WithTopK) else held)

    def judge(self, networks: Networks, batch: Batch, lockstep: bool) -> dict[str, Term]:
        """Have the student answer prompts, and compare each answer with the row's."""
        return self.language.judge(networks, batch, lockstep)

    def _check_attention(self, networks: Networks, batch: Batch) -> None:
        for name in sorted(networks.keys() - self._checked):
            causal_lm.check_attention(networks[name], batch, self.recipe.data.packing)
            self._checked.add(name)

    def _terms(self, networks: Networks, batch: Batch, figures: Sequence[str]) -> dict[str, Term]:
        inputs, learned, config = _inputs(batch), batch["learned"], self.config
        labels = batch["labels"].flatten().index_select(0, learned)
        taught: States = {}
        if config.cache:
            others: tuple[torch.Tensor, ...] = (batch["teacher_ids"], batch["teacher_logs"])
            compare = self._with_kept
        else:
            with torch.no_grad():
                values, logits_of, taught = before_head(networks["teacher"], inputs, learned, config.states)
            others = (values,)
            compare = self._with_teacher(logits_of)

        def reduction(logits: torch.Tensor, labels: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
            shared = logits[:, : self._vocabulary]
            log_p, log_q, top = compare(shared, *others)
            soft = divergence(config.divergence, log_p, log_q, config.beta or 0.5).sum() * config.temperature**2
            hard = F.cross_entropy(logits, labels, reduction="sum")
            sums = {"divergence": soft, "cross_entropy": hard}
            if "agreement" in figures:
                sums["agreement"] = (shared.argmax(1) == top).sum().to(soft.dtype)
            return torch.stack([config.hard * hard + (1 - config.hard) * soft, *(sums[name] for name in figures)])

        sums, learning = reduce_with(networks["student"], inputs, learned, reduction, (labels, *others), config.states)
        terms = {"soft" if config.states else "loss": Term(sums[0], "targets")}
        terms |= {n: Term(s.detach(), "targets", 0.0) for n, s in zip(figures, sums[1:], strict=True)}
        real = torch.arange(batch["labels"].shape[1], device=learned.device) < batch["lengths"][:, None]
        if config.hidden:
            pairs = _pairs(config.hidden.layers, learning["hidden_states"], taught["hidden_states"])
            ours, theirs = zip(*pairs, strict=True)
            ours = networks["projection"](ours) if self._projects else ours
            terms["hidden"] = Term(hidden_difference(ours, theirs, real), "tokens", config.hidden.weight)
        if config.attention:
            below = {student - 1: teacher - 1 for student, teacher in config.attention.layers.items()}
            ours, theirs = zip(*_pairs(below, learning["attentions"], taught["attentions"]), strict=True)
            terms["attention"] = Term(attention_difference(ours, theirs, real), "tokens", config.attention.weight)
        return terms

    def _with_teacher(self, logits_of: Callable[[torch.Tensor], torch.Tensor]) -> Compare:
        """Return both networks' log-probabilities of all tokens, and the teacher's most likely token."""

        def compare(logits: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            with torch.no_grad():
                said = logits_of(values)[:, : logits.shape[1]]
                log_p = torch.log_softmax(said / self.config.temperature, 1)
            return log_p, torch.log_softmax(logits / self.config.temperature, 1), said.argmax(1)

        return compare

    def _with_kept(
        self, logits: torch.Tensor, ids: torch.Tensor, logs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the same for the kept tokens and the bucket of all others; the first of them is the most likely."""
        return logs, bucketed(torch.log_softmax(logits / self.config.temperature, 1), ids), ids[:, 0]


Compare = Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
_AT_ONCE = 1024
"""Places whose logits exist at a time while the teacher is asked ahead."""


def _inputs(batch: Batch) -> dict[str, torch.Tensor]:
    return {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}


def _pairs(
    layers: Mapping[int, int], ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(ours[student], theirs[teacher]) for student, teacher in sorted(layers.items())]


def hidden_difference(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], real: torch.Tensor) -> torch.Tensor:
    """Return Σ over real tokens of the squared difference of states (B, T, H), a mean over widths and pairs of layers.

    real: (B, T).
    """
    found = [
        (a.float() - b.float()).square().mean(-1).masked_fill(~real, 0).sum() for a, b in zip(ours, theirs, strict=True)
    ]
    return torch.stack(found).mean()


def attention_difference(
    ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], real: torch.Tensor
) -> torch.Tensor:
    """Return Σ over real tokens of KL(teacher's ‖ student's) attentions (B, A, T, T), a mean over heads and pairs."""
    found = []
    for a, b in zip(ours, theirs, strict=True):
        a, b = a.float(), b.float()
        tiny = torch.finfo(torch.float32).tiny  # what is masked is 0 in both, and adds nothing
        each = (b * (b.clamp_min(tiny).log() - a.clamp_min(tiny).log())).sum(-1).mean(1)
        found.append(each.masked_fill(~real, 0).sum())
    return torch.stack(found).mean()


def check_agreement(student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast) -> None:
    """Raise UserError unless the same text becomes the same tokens, and a token is the same text, for both."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        token = min(t for t in {**ours, **theirs} if ours.get(t) != theirs.get(t))
        raise UserError(
            f"the tokenizers of networks.student ({len(ours):,} tokens) and networks.teacher ({len(theirs):,}) differ: "
            f"`{token}` is {ours.get(token)} in one and {theirs.get(token)} in the other. A student needs its "
            "teacher's vocabulary: take two networks of one family."
        )
    if _cutting(student) != _cutting(teacher):
        raise UserError(
            "the tokenizers of networks.student and networks.teacher have one vocabulary and cut texts differently: "
            "take two networks of one family."
        )


def _cutting(tokenizer: PreTrainedTokenizerFast) -> list[Any]:
    """Return what determines how a text is cut; not what is done around it, such as padding or a chat template."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    return [parts[name] for name in ("normalizer", "pre_tokenizer", "model")]
