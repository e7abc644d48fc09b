"""Distillation of a text classifier: a student learns from the labels and from a finetuned teacher.

L = Σ over texts (1 - α) · -log p(y) + α · T² · KL(teacher_T || student_T) (Hinton et al., 2015), where _T divides the
logits by a temperature; and, if asked for, the squared distance of their hidden states over tokens (Jiao et al., 2020,
TinyBERT, equations 8 and 9). Shapes: B texts, T positions, C classes, L layers of the student, D and E both widths.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, final

import torch
import torch.nn.functional as F
from pydantic import Field

from scaletrain.config import NetworkSpec, PlayerSpec, Recipe
from scaletrain.data.classes import FILE, Classes
from scaletrain.data.formats import Pairs
from scaletrain.data.text import LabelledTexts
from scaletrain.data.tokenizers import check_vocabulary, identity, load_tokenizer
from scaletrain.errors import UserError
from scaletrain.networks._positions import left, virtual_tokens
from scaletrain.objectives import base
from scaletrain.objectives._text import TextConfig, TextObjective, encoded
from scaletrain.objectives.base import Networks, Request, Samples
from scaletrain.objectives.text_classification import classified, labelled_texts
from scaletrain.player import Batch, Term, Turn

if TYPE_CHECKING:
    from torch import Tensor

    from scaletrain.data.sources import Rows


class Config(TextConfig):
    """Options of the objective."""

    alpha: float = Field(0.5, ge=0, le=1)
    """Share of the teacher's answers in the loss; the rest is that of the labels."""
    temperature: float = Field(2.0, gt=0)
    """By which logits are divided when both are compared."""
    hidden: float = Field(0.0, ge=0)
    """Weight of the distance of hidden states, of the embeddings and after each of the student's layers. Where widths
    differ, a linear network `projection` is trained with the student."""
    follows: list[int] | None = None
    """For each of the student's layers, the teacher's layer whose hidden states it follows, from 0; by default spread
    evenly, the last after the last."""


@final
class Objective(TextObjective[Config]):
    """Train `student` on what `teacher`, which is frozen, says of texts, and on their classes, which it names."""

    turns = (Turn("train", "student"),)
    takes_prompts: ClassVar[bool] = True
    kind: ClassVar[str] = "text_classifier"
    trained: ClassVar[str] = "student"
    _teacher: Path | None = None
    _widths: tuple[int, int] | None = None
    """Of student and teacher, where their hidden states are compared."""

    def __init__(self, config: Config, recipe: Recipe):
        super().__init__(config, recipe)
        self.teacher = recipe.networks.get("teacher", NetworkSpec())
        if not self.teacher.frozen or self.teacher.source is self.teacher.path is None:
            raise UserError("networks.teacher must have `frozen: true`, and `from` or `path` for its weights")

    def prepare(self, train: Rows, eval: Rows | None) -> None:
        """Find the tokenizer and the teacher's classes, and check both networks. Raises UserError with the key."""
        label = train.require("label", "the class of a text")
        self.tokenizer = self.find_tokenizer(train, "text")
        place = str(self._teacher or self.teacher.path)
        if identity(load_tokenizer(place, "networks.teacher")) != identity(self.tokenizer):
            raise UserError(
                "networks.teacher: its tokenizer is not the student's, so that their tokens are not of the same text. "
                f"Take a student that was trained with the tokenizer of `{place}`."
            )
        settings = _settings(place)
        if not (self._teacher or _classifies(settings)):
            raise UserError(
                f"networks.teacher: `{place}` does not classify yet: finetune it first, as text/classify does."
            )
        classes = _classes(place, settings, isinstance(train.column(label)[0], str))
        self._check_order(classes)
        self.classes = classes
        length, wanted = self.check_network(), self.recipe.data.seq_len
        check_vocabulary(self.tokenizer, settings.vocab_size, "networks.teacher")
        limit = getattr(settings, "max_position_embeddings", None)
        limit = left(limit, virtual_tokens(self.teacher.adapter)) if limit else length
        if wanted and wanted > limit:
            raise UserError(f"data.seq_len={wanted}: the teacher has {limit} positions. Lower it.")
        if self.config.hidden:
            self._match(settings)
        # One of its own: a tokenizer must not be used by two threads at a time.
        self._pairs = Pairs(copy.deepcopy(self.tokenizer), min(length, limit), "text_pair" in train.columns)

    def _check_order(self, classes: Classes) -> None:
        """Raise UserError when the student's head, if it has one, is of the teacher's classes in another order."""
        own = self.classes.names if self.classes else ()
        if self.spec.path and _classifies(settings := _settings(self.spec.path)):
            own = _classes(self.spec.path, settings, True).names
        if own and own != classes.names:
            raise UserError(
                f"networks.student: its classes are {', '.join(own)}; the teacher's are {', '.join(classes.names)}."
            )

    def _match(self, teacher: Any) -> None:
        """Say which hidden states are compared, and whether they need a projection. Raises UserError."""
        if self.spec.source:
            raise UserError("objective.hidden: give networks.student a `path`, or a `config`, in place of `from`.")
        student, _ = self.outlined()
        layers, of = student.num_hidden_layers, teacher.num_hidden_layers
        follows = self.config.follows or [(i + 1) * of // layers - 1 for i in range(layers)]
        if len(follows) != layers or not all(0 <= i < of for i in follows):
            raise UserError(
                f"objective.follows: {follows}: give one of the teacher's {of} layers, from 0, for each of the "
                f"student's {layers}."
            )
        self._follows = [0, *(i + 1 for i in follows)]  # among hidden states, of which the embeddings are the first
        self._widths = (student.hidden_size, teacher.hidden_size)
        player = self.recipe.players.get("student", PlayerSpec())
        if self._projects and sorted(player.networks or []) != ["projection", "student"]:
            raise UserError(
                f"objective.hidden: the student is {student.hidden_size} wide, the teacher {teacher.hidden_size}, so "
                "that a projection is learned: set players.student.networks=[student, projection]."
            )

    @property
    def _projects(self) -> bool:
        return self._widths is not None and self._widths[0] != self._widths[1]

    def networks(self) -> dict[str, NetworkSpec]:
        """Return student and teacher, and the projection where there is one."""
        found = super().networks()
        settings = {} if self.teacher.source else self.found()
        found["teacher"] = base.completed(self.recipe, "teacher", self.kind, **settings)
        if self._projects:
            assert self._widths is not None
            inputs, outputs = self._widths
            found["projection"] = base.completed(
                self.recipe, "projection", "mlp", inputs=inputs, outputs=outputs, hidden=[]
            )
        return found

    def restore(self, folders: Mapping[str, Path]) -> None:
        """Take what belongs to the student from its folder, and note where the teacher's is."""
        super().restore(folders)
        self._teacher = folders.get("teacher")

    def examples(self, rows: Rows, training: bool, window: bool = False) -> LabelledTexts:
        """Tokenise, and encode the classes. Raises UserError that names the row."""
        assert self.classes is not None
        labels = self.classes.encode(rows, rows.require("label", "the class of a text"))
        return labelled_texts(rows, self._pairs, labels, window)

    def counts(self, turn: Turn, batch: Batch) -> dict[str, int]:
        """Return the texts, `samples`, and their real tokens, `tokens`."""
        return {"samples": len(batch["labels"]), "tokens": int(batch["attention_mask"].sum())}

    def loss(self, turn: Turn, networks: Networks, batch: Batch) -> dict[str, Term]:
        """Return the cross-entropies of the labels, `hard`, and of the teacher's answers, `soft`, and the distance."""
        alpha, heat, inputs = self.config.alpha, self.config.temperature, encoded(batch)
        states = self._widths is not None
        with torch.no_grad():
            teacher = networks["teacher"](**inputs, output_hidden_states=states)
        student = networks["student"](**inputs, output_hidden_states=states)
        logits, told, labels = student.logits.float(), teacher.logits.float(), batch["labels"]
        hard = F.cross_entropy(logits, labels, reduction="sum")
        soft = heat**2 * F.kl_div(
            (logits / heat).log_softmax(-1), (told / heat).log_softmax(-1), reduction="sum", log_target=True
        )
        terms = {"hard": Term(hard, "samples", 1 - alpha), "soft": Term(soft, "samples", alpha)}
        if states:
            distance = self._distance(networks, student.hidden_states, teacher.hidden_states, batch["attention_mask"])
            terms["hidden"] = Term(distance, "tokens", self.config.hidden)
        return terms | _agreement(logits.detach(), told, labels)

    def _distance(
        self, networks: Networks, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], mask: Tensor
    ) -> Tensor:
        """Return the squared distance of hidden states over real tokens, a mean over layers and dimensions.

        student: L + 1 of (B, T, D). teacher: more of (B, T, E). mask: (B, T).
        """
        own = torch.stack(student)
        if self._projects:
            own = networks["projection"](own)
        aim = torch.stack([teacher[i] for i in self._follows])
        squared: Tensor = (own.float() - aim.float()).square().mean(-1).mean(0)
        return (squared * mask).sum()

    def evaluate(self, networks: Networks, batch: Batch) -> dict[str, Term]:
        """Return the student's cross-entropy and accuracy, and how often it says what the teacher says."""
        inputs, labels = encoded(batch), batch["labels"]
        logits, told = (networks[name](**inputs).logits.float() for name in ("student", "teacher"))
        loss = F.cross_entropy(logits, labels, reduction="sum")
        return {"loss": Term(loss, "samples"), **_agreement(logits, told, labels)}

    def sample(self, networks: Networks, request: Request) -> Samples | None:
        """Have the student classify the texts of the request; nothing is drawn without them."""
        if not request.prompts:
            return None
        assert self.classes is not None
        with torch.no_grad():
            batch = self.batch_of(request.prompts, networks["student"], request.generator.device)
            logits = networks["student"](**batch).logits.float()
        return classified(logits, self.classes.names, request.prompts)


def _agreement(logits: Tensor, told: Tensor, labels: Tensor) -> dict[str, Term]:
    found = logits.argmax(-1)
    right, same = (found == labels).sum(), (found == told.argmax(-1)).sum()
    return {"accuracy": Term(right, "samples", 0.0), "agreement": Term(same, "samples", 0.0)}


def _settings(place: str) -> Any:
    """Read the configuration of a network, or of the one that an adapter is for. Raises UserError."""
    from scaletrain.networks import text_classifier

    adapter = Path(place, "adapter_config.json")
    base = json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.exists() else place
    return text_classifier.read_config(base, text_classifier.Config()).get_text_config()


def _classifies(settings: Any) -> bool:
    """Say whether a network has a head for whole texts."""
    return any(name.endswith("ForSequenceClassification") for name in settings.architectures or ())


def _classes(place: str, settings: Any, named: bool) -> Classes:
    """Return the classes of a finetuned network: what was written beside it, or what its configuration says."""
    if Path(place, FILE).exists():
        return Classes.load(Path(place))
    return Classes(tuple(settings.id2label[i] for i in range(settings.num_labels)), named)
