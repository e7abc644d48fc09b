"""The interface of a model family. One file beside this one for each: a `Config` and a final class `Objective`.

An objective names the networks, says in which turns they are trained and on what loss, and how to evaluate and sample.
It knows no optimiser, no rank, no device and no engine. The life of one:

1. `Objective(config, recipe)`: check what the recipe alone can tell; raise UserError.
2. `prepare(rows)`: learn from the data what `networks()` has to say: vocabulary, classes, image shape; then
   `examples(rows)`: read, check and tokenise them. Where there is a checkpoint and no data (sample, export),
   `restore(folders)` takes the place of `prepare`. What frozen networks have to say of the data, once, is `ahead()`.
3. `enrich`, `counts`, `loss`, `after_update` in the loop; `evaluate`, `sample` between; `report` once at the end of the
   run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

from scaletrain.config import NetworkSpec, Recipe, Strict
from scaletrain.errors import UserError
from scaletrain.player import Batch, Player, Term, Turn

if TYPE_CHECKING:
    import torch
    from torch import nn

    from scaletrain.data.contract import Inspection
    from scaletrain.data.dataset import Dataset
    from scaletrain.data.sources import Rows
    from scaletrain.data.stream import Stream
    from scaletrain.diffusion.pipelines import Plan

C = TypeVar("C", bound=Strict)

Networks = Mapping[str, "nn.Module"]
"""By name. Those that the turn trains are wrapped by the engine: get gradients only through `networks[name](...)`.
The others are plain modules, without gradients to their parameters."""


_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "decoder_input_ids", "decoder_attention_mask")


@dataclass(frozen=True)
class Data:
    """The examples of a run, once prepared.

    facts: fingerprints, by name, of what a run that goes on must find unchanged. streamed: the training rows are read
    as they are needed, in lanes.
    """

    train: Dataset | Stream
    eval: Dataset | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    streamed: bool = False


@dataclass(frozen=True)
class Request:
    """What to draw. `generator` lives on the device of the networks; `prompts` for families that take text."""

    count: int
    generator: torch.Generator
    prompts: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Samples:
    """What was drawn: pictures (N, C, H, W) float in [0, 1], or texts, or points (N, D)."""

    images: torch.Tensor | None = None
    texts: list[str] | None = None
    points: torch.Tensor | None = None
    rows: int | None = None
    """Pictures to a row of the grid."""


@dataclass(frozen=True)
class RunView:
    """A whole run, as its final report sees it: the data, and every stage's networks (EMA weights where kept)."""

    folder: Path
    stages: tuple[str, ...]
    data: Data
    device: torch.device
    seed: int
    network: Callable[[str, str], nn.Module]
    """(stage, network) -> that network as the stage left it, in evaluation mode, without gradients."""
    objective: Callable[[str], Objective[Any]]
    """(stage) -> its objective, restored."""
    other: Callable[[str], nn.Module]
    """`run:FOLDER/NETWORK` -> that network of another run, as those of this one."""


@dataclass(frozen=True)
class Report:
    """The end of a run in figures: for the terminal (`text`), and files in the run folder by name."""

    text: str
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    pictures: dict[str, Samples] = field(default_factory=dict)


@dataclass(frozen=True)
class Ahead:
    """Work that frozen networks do once, before the training, and that is kept on disk: the training does without them.

    networks: which, by name. missing: gives the numbers of the parts of the work that are not done yet. do: does one,
    of these networks on this device, without gradients; called on every rank equally often, perhaps twice for the same
    part. kind: of a part; processes do parts of one kind at a time, which call the networks equally often.
    """

    networks: Mapping[str, NetworkSpec]
    missing: Callable[[], list[int]]
    do: Callable[[Networks, torch.device, int], None]
    kind: Callable[[int], Hashable]


class Source(Protocol):
    """Data of which something is kept in parts."""

    @property
    def parts(self) -> int:
        """How many there are."""
        ...

    def missing(self) -> list[int]:
        """Return the numbers of those that are not there yet."""
        ...


S = TypeVar("S", bound=Source)


def ahead_of(
    networks: Mapping[str, NetworkSpec], sources: Sequence[S], do: Callable[[Networks, torch.device, S, int], None]
) -> Ahead:
    """Return the work of sources, each a kind of its own. do: does a part of one."""
    parts = [(number, part) for number, source in enumerate(sources) for part in range(source.parts)]

    def missing() -> list[int]:
        gaps = [set(source.missing()) for source in sources]
        return [i for i, (number, part) in enumerate(parts) if part in gaps[number]]

    def one(found: Networks, device: torch.device, number: int) -> None:
        source, part = parts[number]
        do(found, device, sources[source], part)

    return Ahead(networks, missing, one, kind=lambda number: parts[number][0])


def together(first: Ahead | None, second: Ahead) -> Ahead:
    """Return the work of both: parts of the second have odd numbers."""
    if first is None:
        return second
    works = first, second

    def missing() -> list[int]:
        return sorted(2 * part + i for i, work in enumerate(works) for part in work.missing())

    def do(networks: Networks, device: torch.device, part: int) -> None:
        works[part % 2].do(networks, device, part // 2)

    def kind(part: int) -> Hashable:
        return part % 2, works[part % 2].kind(part // 2)

    return Ahead({**first.networks, **second.networks}, missing, do, kind)


class Objective(ABC, Generic[C]):
    """A family's training rule over named networks. Subclasses are final and called `Objective`."""

    turns: tuple[Turn, ...] = (Turn("train", "model"),)
    """The schedule. Set it in `__init__` when it depends on options."""
    data_keys: ClassVar[frozenset[str]] = frozenset()
    """Which of `data.seq_len` and `data.packing` the family uses; the others are refused."""
    windowed: ClassVar[bool] = False
    """Whether an example is not simply a row, so that the rows of a stream become examples a window at a time."""
    takes_prompts: ClassVar[bool] = False
    """Whether `sample` heeds the prompts of a request."""
    enriching: bool = False
    """Whether `enrich` does something. Set it in `__init__` when it depends on options."""
    surveys: bool = False
    """Whether the loss needs `survey`. Set it in the same way."""
    differentiates_forward: ClassVar[bool] = False
    """Whether the loss differentiates networks forward, by dual numbers."""
    companions: ClassVar[tuple[str, ...]] = ()
    """Frozen networks that are exported with the trained ones."""
    throughput: ClassVar[str] = "samples"
    """The unit, among those of `counts` or `samples`, that the progress line gives per second."""

    def __init__(self, config: C, recipe: Recipe):
        if self.differentiates_forward and recipe.train.compile != "off":
            raise UserError(
                f"train.compile: {recipe.objective.type} differentiates forward, which compiled networks do not; leave "
                "it out."
            )
        self.config = config
        self.recipe = recipe
        self.origins: Mapping[str, str] = {n: spec.source for n, spec in recipe.networks.items() if spec.source}
        """The `from` of the networks that go on from others, by name; before the training, of the stage before, too."""

    def prepare(self, train: Rows, eval: Rows | None) -> None:
        """Learn from all rows of the recipe what networks and examples need: a tokenizer, classes, the image shape.

        Called on every rank with the same rows; cached work is shared through files. Raises UserError that names the
        column, file or row.
        """

    @abstractmethod
    def examples(self, rows: Rows, training: bool, window: bool = False) -> Dataset:
        """Turn rows, of one source or of several, into examples. Called after `prepare`, as `prepare` is.

        window: a few rows of a stream, read while training: nothing is cached on disk, and it may come to no example.
        """

    def inspect(self, dataset: Dataset) -> Inspection | None:
        """Say what examples of one training source are, and what is wrong with them, before a network is built.

        dataset: what `examples` returned. Called on one rank, before the first start of a stage.
        """
        return None

    def facts(self) -> dict[str, str]:
        """Return fingerprints of what beside the rows makes the examples, such as the tokenizer."""
        return {}

    def restore(self, folders: Mapping[str, Path]) -> None:
        """Take what `prepare` found out (a tokenizer, say) from the networks' folders of a checkpoint.

        Called before `prepare` when networks continue from another stage or run: what they came with is kept.
        """

    def save_assets(self, network: str, folder: Path) -> None:
        """Write what belongs beside a network's weights (a tokenizer, say) into its folder."""

    @abstractmethod
    def networks(self) -> dict[str, NetworkSpec]:
        """Return every network of the recipe, completed by what the data told: vocabulary, classes, image shape.

        `networks.<name>.type` and `config` may be left out of a recipe where the family has a default.
        """

    def ahead(self) -> Ahead | None:
        """Return what frozen networks, which `networks` then leaves out, have to do before the training, or None."""
        return None

    def enrich(
        self, turn: Turn, networks: Networks, window: Sequence[Batch], seeds: Sequence[int], device: torch.device
    ) -> list[Batch]:
        """Return the micro-batches of a window, still on the CPU, with what networks make of them before they are
        counted: continuations, replayed or refined samples. Called, without gradients, where `enriching` is set.

        networks: plain ones, on the device. seeds: one for each micro-batch, a function of its position; torch's
        global generators are seeded by the window's, so that what is drawn from them is the same on all ranks. Each
        rank must call networks equally often for each micro-batch, whatever is in it: they may be held in parts.
        """
        raise NotImplementedError

    @abstractmethod
    def counts(self, turn: Turn, batch: Batch) -> dict[str, int]:
        """Return how many of each unit a micro-batch has. The batch is on the CPU."""

    @abstractmethod
    def loss(self, turn: Turn, networks: Networks, batch: Batch) -> dict[str, Term]:
        """Return the terms of this turn's loss. torch's global generators are seeded by position before the call."""

    def survey(self, turn: Turn, networks: Networks, batch: Batch) -> dict[str, Term]:
        """Return, of a micro-batch, what the loss must know of the whole global batch; without gradients.

        Called for all micro-batches of a window before the first `loss`, to which each is then given in its batch: ()
        tensors by name, the sum over all divided by its count.
        """
        return {}

    def after_update(self, player: Player, networks: Networks) -> None:
        """Do what follows an update: target networks, weight clipping, codebooks. Not called when it was skipped.

        Weights may be changed in place, by all processes alike; networks are not called here.
        """

    def evaluate(self, networks: Networks, batch: Batch) -> dict[str, Term]:
        """Return terms of one evaluation micro-batch, without gradients; by default the loss of the first turn.

        Each term is summed over the evaluation set and divided once. `loss`, where there is one, is what patience and
        `checkpoint.best` look at by default.
        """
        return self.loss(self.turns[0], networks, batch)

    def inputs(self, network: str, batch: Batch) -> dict[str, torch.Tensor] | None:
        """Return what a network is called with, by keyword, on a batch of `examples`: exports are compared on it.

        By default the tokens that a network of transformers takes; None where a batch has none.
        """
        return {key: batch[key] for key in _INPUTS if key in batch} if "input_ids" in batch else None

    def conclude(self, metrics: dict[str, float]) -> dict[str, float]:
        """Add what follows from the divided sums, such as a perplexity."""
        return metrics

    def answers(self, held: Dataset) -> Dataset | None:
        """Return, of a set to evaluate on, the examples that `judge` is called with; by default none."""
        return None

    def judge(self, networks: Networks, batch: Batch, lockstep: bool) -> dict[str, Term]:
        """Generate answers for a batch of `answers`, without gradients; return terms per `answers`, of weight 0.

        lockstep: all ranks are called as often, and must call networks as often.
        """
        raise NotImplementedError

    def sample(self, networks: Networks, request: Request) -> Samples | None:
        """Draw samples without gradients, or None for a family that has nothing to show."""
        return None

    def reply(
        self,
        networks: Networks,
        messages: Sequence[Mapping[str, Any]],
        request: Request,
        told: Callable[[str], None],
    ) -> str:
        """Return the answer to a conversation of {role, content}; `told` is given its text as it comes.

        A family that does not talk leaves this as it is. Raises UserError for messages that cannot be written.
        """
        raise NotImplementedError

    def language_model(self, networks: Networks) -> tuple[nn.Module, Any]:
        """Return the network that continues texts, and its tokenizer, for tools that take them as they are.

        A family without one leaves this as it is.
        """
        raise NotImplementedError

    def pipeline(self, network: str) -> Plan | None:
        """Return the pipeline of diffusers that a trained network is exported in, or None for the network alone."""
        return None

    def report(self, view: RunView) -> Report | None:
        """Judge the run as a whole after its last stage (the last stage's objective is asked), or None."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return what the family carries from step to step: tensors and JSON values. The same on every rank."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""


def completed(recipe: Recipe, name: str, type: str, **found: Any) -> NetworkSpec:
    """Return `networks.<name>` of a recipe with `type` where it names none, and with what the data told as its config.

    Raises UserError when the recipe's config says something else.
    """
    spec = recipe.networks.get(name, NetworkSpec())
    for key, value in found.items():
        given = spec.config.get(key, value)
        if given != value:
            raise UserError(
                f"networks.{name}.config.{key} is {given!r}, but the data and the objective make it {value!r}: "
                f"leave it out"
            )
    return spec.model_copy(update={"type": spec.type or type, "config": {**spec.config, **found}})
