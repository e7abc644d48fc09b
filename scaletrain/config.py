"""The typed tree that a recipe file decodes to. Strict: a key that nobody knows is an error, at any depth.

This module imports no torch. The options of one objective, or of one type of network, are checked by the `Config` of
its own module (see `scaletrain.recipe.check`), before a device is touched.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    WithJsonSchema,
    field_validator,
    model_validator,
)


class Strict(BaseModel):
    """A piece of configuration: unknown keys are refused, values are not changed after decoding."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, protected_namespaces=())


class Open(BaseModel):
    """A piece whose other keys belong to the module that `type` names, and are checked by that module's `Config`."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())

    @property
    def options(self) -> dict[str, Any]:
        """The keys that this class does not know itself."""
        return dict(self.model_extra or {})


# --- durations --------------------------------------------------------------------------------------------------------

UNITS = ("steps", "epochs", "tokens", "samples")


class Duration:
    """A number with its unit: `2_000 steps`, `3 epochs`, `1e9 tokens`, `50_000 samples`."""

    __slots__ = ("unit", "value")

    def __init__(self, value: float, unit: str):
        self.value, self.unit = value, unit

    @classmethod
    def parse(cls, text: object) -> Duration:
        """Read a duration. Raises ValueError that says how to write one."""
        if isinstance(text, Duration):
            return text
        match = re.fullmatch(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*([a-z]+)\s*", str(text))
        unit = match.group(2) if match else ""
        unit = unit if unit.endswith("s") else unit + "s"
        if not match or unit not in UNITS:
            raise ValueError(f"write a number and a unit, such as `2_000 steps`; units are {', '.join(UNITS)}")
        value = float(match.group(1).replace("_", ""))
        if value <= 0 or not math.isfinite(value):
            raise ValueError("must be more than 0")
        if unit != "epochs" and value != int(value):
            raise ValueError(f"there is no part of {unit.removesuffix('s')}: write a whole number")
        return cls(value, unit)

    def __str__(self) -> str:
        number = f"{self.value:_.0f}" if self.value == int(self.value) else repr(self.value)
        return f"{number} {self.unit}"

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Duration) and (self.value, self.unit) == (other.value, other.unit)

    def __hash__(self) -> int:
        return hash((self.value, self.unit))


DurationField = Annotated[
    Any,
    BeforeValidator(Duration.parse),
    PlainSerializer(str),
    WithJsonSchema({"type": "string", "pattern": r"^[0-9_.eE+]+ *(steps?|epochs?|tokens?|samples?)$"}),
]


def _steps(text: object) -> Duration:
    duration = Duration.parse(f"{text} steps" if isinstance(text, int) and not isinstance(text, bool) else text)
    if duration.unit not in ("steps", "epochs"):
        raise ValueError("write it in steps or epochs, such as `500 steps`")
    return duration


Interval = Annotated[
    Any,
    BeforeValidator(_steps),
    PlainSerializer(str),
    WithJsonSchema({"type": ["string", "integer"], "description": "such as `500 steps` or `1 epochs`"}),
]

# --- parts ------------------------------------------------------------------------------------------------------------


class ObjectiveSpec(Open):
    """The family's training rule: `type` names a module of `scaletrain.objectives`; the rest are its options."""

    type: str


_LORA = ("r", "alpha", "dropout", "targets", "train_also")
_ADAPTER_OPTIONS = {
    "lora": _LORA, "rslora": _LORA, "dora": _LORA, "pissa": (*_LORA, "niter"), "olora": _LORA, "loftq": _LORA,
    "vera": ("r", "dropout", "d_initial", "targets", "train_also"), "ia3": ("targets", "feedforward", "train_also"),
    "prompt": ("virtual_tokens",),
}  # fmt: skip
"""What each type of adapter has, beside `merge`."""


class AdapterSpec(Strict):
    """What is trained over a frozen network, by peft; each type has its own options (see `networks/adapters.py`).

    lora, rslora, dora: W + s · B A, B = 0 at first. pissa, olora: the same, of the weight's own main part. loftq: of
    what quantisation took from it. vera: vectors around fixed random matrices. ia3: factors. prompt: virtual tokens.
    """

    type: Literal["lora", "rslora", "dora", "pissa", "olora", "loftq", "vera", "ia3", "prompt"] = "lora"
    r: int | None = Field(None, ge=1)
    """The rank: by default 16, of vera 256."""
    alpha: float | None = Field(None, gt=0)
    """s = alpha / r, of rslora alpha / sqrt(r); by default 32."""
    dropout: float | None = Field(None, ge=0, lt=1)
    targets: str | list[str] | None = None
    """`all-linear`, a regular expression, or a list of module name endings. By default all linear modules; of ia3 those
    of its paper."""
    train_also: list[str] = []
    """Names of modules that are trained whole, such as a classification head."""
    niter: int | None = Field(None, ge=1)
    """pissa: power iterations of a fast SVD that is not exact; by default the exact one."""
    d_initial: float | None = Field(None, gt=0)
    """vera: what the trained vector d begins with, by default 0.1."""
    feedforward: list[str] | None = None
    """ia3: those of the targets whose inputs are scaled, not their outputs."""
    virtual_tokens: int | None = Field(None, ge=1)
    """prompt: how many are put before the text, by default 16."""
    path: str | None = None
    """Go on with the adapter in this folder, of peft's layout, in place of a new one."""
    merge: list[str] = []
    """Folders of adapters that are folded into the weights before, in this order."""

    @model_validator(mode="after")
    def _own_options(self) -> AdapterSpec:
        own = ("path",) if self.path else _ADAPTER_OPTIONS[self.type]
        for name, field in type(self).model_fields.items():
            if name in ("type", "path", "merge", *own) or getattr(self, name) == field.get_default():
                continue
            who = "the adapter in `path` has its own" if self.path else f"{self.type} has no"
            raise ValueError(f"{who} `{name}`: leave it out (`{name}: null`)")
        if self.path and self.type != "lora":
            raise ValueError("the folder in `path` says of which type its adapter is: leave `type` out")
        return self


class QuantizeSpec(Strict):
    """Weights of linear modules in 4 or 8 bits, by bitsandbytes, of a network that stays as it is.

    nf4, fp4: Dettmers et al., 2023, QLoRA: 64 weights share a scale. int8: Dettmers et al., 2022, LLM.int8(): those of
    an output do. What is not quantised is float32.
    """

    type: Literal["nf4", "fp4", "int8"]
    double: bool = False
    """nf4, fp4: quantise the scales, too: 0.4 bits less for a weight."""
    compute: Literal["float32", "bfloat16", "float16"] | None = None
    """nf4, fp4: what products are computed in, by default float32. (int8 computes products of integers.)"""
    skip: list[str] = []
    """Names of modules that stay as they are, beside the output head and what a task puts on top."""

    @model_validator(mode="after")
    def _own_options(self) -> QuantizeSpec:
        if self.type == "int8" and (self.double or self.compute):
            raise ValueError(f"int8 has no `{'double' if self.double else 'compute'}`: leave it out")
        return self


def _quantize(value: object) -> object:
    return {"type": value} if isinstance(value, str) else value


QuantizeMethod = Literal["int8", "int8-dynamic", "int4", "bnb-int8", "bnb-nf4"]
"""How trained weights may be quantised: by torchao (int8 of weights alone, or of activations too; int4 by groups) or by
bitsandbytes."""


class QATSpec(Strict):
    """Quantisation-aware training (Jacob et al., 2018): each forward pass rounds the weights of linear layers as
    `type` will, and gradients pass the rounding by. What is trained, saved and exported are the weights in float.
    """

    type: Literal["int4", "int8"] = "int4"
    group: int | None = Field(None, ge=8)
    """int4: neighbouring weights of a row that share a scale, by default 32. In int8, all of a row do."""

    @model_validator(mode="after")
    def _group_is_for_int4(self) -> QATSpec:
        if self.type == "int8" and self.group is not None:
            raise ValueError("int8 has a scale for each row of a weight: leave `group` out")
        return self

    @property
    def shared(self) -> int | None:
        """How many weights share a scale; None for all of a row."""
        return (self.group or 32) if self.type == "int4" else None


class NetworkSpec(Strict):
    """How one named network is built. `type` names a module of `scaletrain.networks`.

    path: a local folder or a Hub id with pretrained weights. config: options of the architecture, checked by the
    module of `type`.
    frozen: it is not trained. adapter: train this instead of the weights. dtype: of frozen weights.
    quantize: how frozen weights, or those under an adapter, are held; `nf4` stands for `{type: nf4}`.
    from: weights of another network, `stage:NAME/NETWORK` of this run or `run:FOLDER/NETWORK` of another.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    type: str | None = None
    path: str | None = None
    config: dict[str, Any] = {}
    adapter: AdapterSpec | None = None
    frozen: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantize: Annotated[QuantizeSpec | None, BeforeValidator(_quantize)] = None
    trainable: str | list[str] | None = None
    """Train only the parameters in whose name this regular expression, or one of these, is found."""
    trust_remote_code: bool = False
    """Run the code that comes with the weights. It may do anything: read it first."""
    shard: bool | None = None
    """Of a frozen network under FSDP2 and ZeRO-3: hold it in parts too, and gather a block when it computes; by default
    from 1e9 weights on."""
    source: str | None = Field(None, alias="from", pattern=r"^(stage:[^/]+/[^/]+|run:.+/[^/]+)$")
    qat: QATSpec | None = None
    """Train it for being quantised: `scaletrain quantize` then does it."""

    @model_validator(mode="after")
    def _qat_trains_all(self) -> NetworkSpec:
        if self.qat and (self.adapter or self.frozen):
            other = "adapter" if self.adapter else "frozen"
            raise ValueError(
                f"`qat` rounds the weights that are trained, and `{other}` leaves them as they are: take one of the two"
            )
        return self


class GroupSpec(Strict):
    """Figures of an optimiser for some of its parameters: those in whose name, `network/parameter`, `match` is found.

    LoRA+ (Hayou et al., 2024) is `{match: lora_B, lr_factor: 16}`.
    """

    match: str
    lr: float | None = Field(None, gt=0)
    lr_factor: float | None = Field(None, gt=0)
    """The rate as a multiple of the optimiser's, in place of `lr`."""
    weight_decay: float | None = Field(None, ge=0)

    @field_validator("match")
    @classmethod
    def _expression(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"`{value}` is no regular expression: {error}") from error
        return value

    @model_validator(mode="after")
    def _something(self) -> GroupSpec:
        if self.lr and self.lr_factor:
            raise ValueError("give `lr` or `lr_factor`, not both")
        if self.lr is None and self.lr_factor is None and self.weight_decay is None:
            raise ValueError("give `lr`, `lr_factor` or `weight_decay`")
        return self


class OptimizerSpec(Strict):
    """An optimiser and its figures; a key that the chosen type does not have is refused."""

    type: Literal[
        "sgd", "adagrad", "rmsprop", "adam", "adamw", "adafactor", "lion", "muon",
        "adam8bit", "adamw8bit", "lion8bit", "paged_adamw8bit",
    ] = "adamw"  # fmt: skip
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    """Not applied to biases, norms and other vectors."""
    groups: list[GroupSpec] = []
    """Parameters with figures of their own: each belongs to the first group that matches it, or to none."""
    betas: Annotated[tuple[float, float], Field(strict=False)] | None = None
    eps: float | None = Field(None, gt=0)
    momentum: float | None = Field(None, ge=0, lt=1)
    nesterov: bool | None = None
    alpha: float | None = Field(None, gt=0, lt=1)


class ScheduleSpec(Strict):
    """How the learning rate changes with the updates of a player, after a warm-up (linear; one_cycle's is a cosine)."""

    type: Literal[
        "constant", "linear", "cosine", "wsd", "inverse_sqrt", "polynomial", "one_cycle", "plateau"
    ] = "constant"  # fmt: skip
    warmup_steps: int = Field(0, ge=0)
    warmup_share: float = Field(0.0, ge=0, lt=1)
    """The warm-up as a share of all updates, in place of `warmup_steps`."""
    final: float = Field(0.0, ge=0, le=1)
    """Factor of the peak rate at the end (linear, cosine, wsd, polynomial, one_cycle) or the floor (plateau)."""
    decay_share: float = Field(0.2, gt=0, le=1)
    """wsd: share of the updates at the end during which the rate falls."""
    power: float = Field(2.0, gt=0)
    """polynomial."""
    patience: int = Field(3, ge=1)
    """plateau: evaluations without a better metric before the rate falls."""
    factor: float = Field(0.5, gt=0, lt=1)
    """plateau: what the rate is multiplied by."""


class EMASpec(Strict):
    """An exponential moving average of a player's weights; evaluation, samples, exports and later stages use it."""

    decay: float = Field(0.999, gt=0, lt=1)
    warmup: bool = True
    """Use min(decay, (1 + updates) / (10 + updates)), so that early averages forget the initial weights."""


class ScalerSpec(Strict):
    """Loss scaling under fp16: dynamic (halve on overflow, double after `interval` good updates), static or off."""

    type: Literal["dynamic", "static", "off"] = "dynamic"
    initial: float = Field(65536.0, gt=0)
    interval: int = Field(2000, ge=1)
    minimum: float = Field(1.0, gt=0)


class PlayerSpec(Strict):
    """What one player trains and how."""

    networks: list[str] | None = None
    """Names of its networks; by default the network with the player's own name."""
    optimizer: OptimizerSpec = OptimizerSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    clip: float | None = Field(None, gt=0)
    """Largest global norm of the gradient; none by default."""
    ema: EMASpec | None = None
    scaler: ScalerSpec = ScalerSpec()


def _source(value: object) -> object:
    return {"path": value} if isinstance(value, str) else value


def _sources(value: object) -> object:
    return [_source(v) for v in value] if isinstance(value, list) else [_source(value)] if value is not None else None


def _weight(value: object) -> object:
    if not isinstance(value, dict):
        return value
    if 0 not in value:
        raise ValueError("a weight by step begins with step 0, such as {0: 1, 2000: 0.5}")
    return value


Weight = Annotated[
    Annotated[float, Field(ge=0, allow_inf_nan=False)]
    | dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=0, allow_inf_nan=False)]],
    BeforeValidator(_weight),
]


class SourceSpec(Strict):
    """Where rows come from. A plain string stands for its `path`."""

    path: str
    """A file, a glob, a folder, any fsspec URL, a Hub id, `sklearn:digits`, or `noise:N` for those that draw data."""
    type: Literal[
        "parquet", "jsonl", "csv", "text", "images", "arrow", "hub", "sklearn", "webdataset", "mds", "noise"
    ] | None = None  # fmt: skip
    """Inferred from the path when it is left out."""
    stream: bool = False
    """Read rows when they are wanted and keep none: for parquet, jsonl and hub; webdataset and mds always do."""
    cache_gb: float = Field(50.0, gt=0)
    """stream: disk space for local copies of remote and compressed shards; it should hold those in use at a time."""
    columns: dict[str, str] = {}
    """Role to column, such as {text: sentence, label: gold}; by default a role's column has its name."""
    rows: int | None = Field(None, ge=1)
    """Take the first so many."""
    split: str | None = None
    """Of a Hub data set or a `DatasetDict`."""
    weight: Weight | None = None
    """Its part of the examples, against the other sources' weights; or by step, such as {0: 1, 2000: 0.5}: each holds
    from its step on. All sources of a list have one, or none: then their rows are put one after the other."""


def _sources_weighted(value: list[SourceSpec]) -> list[SourceSpec]:
    if len({source.weight is None for source in value}) > 1:
        raise ValueError("give every source of the list a `weight`, or none")
    return value


def _unweighted(value: list[SourceSpec] | None) -> list[SourceSpec] | None:
    if any(source.weight is not None for source in value or ()):
        raise ValueError("data for evaluation are taken as they are, each once: leave `weight` out")
    return value


Sources = Annotated[list[SourceSpec], BeforeValidator(_sources), AfterValidator(_sources_weighted)]


class DataSpec(Strict):
    """Data for training and evaluation, and how rows become batches."""

    train: Sources
    eval: Annotated[list[SourceSpec] | None, BeforeValidator(_sources), AfterValidator(_unweighted)] = None
    holdout: float = Field(0.0, ge=0, lt=1)
    """Share of the training rows that are set aside for evaluation when `eval` is not given."""
    seq_len: int | None = Field(None, ge=2)
    packing: bool = False
    weigh_by: Literal["samples", "tokens"] = "samples"
    """What the weights of sources are parts of; `tokens` needs data that have them."""
    shuffle: int = Field(16_384, ge=1)
    """Rows that are mixed with one another where they are streamed, in all lanes together; at most 64 MiB of files."""
    workers: int | None = Field(None, ge=0)
    """Processes that prepare batches; by default none for data in memory, up to 4 where files are decoded."""
    seed: int | None = None
    """Of the order; by default the recipe's seed."""


class GuardSpec(Strict):
    """What is done about an update that is not finite, or that stands out (a spike).

    stop: save nothing, name the samples and end. skip: leave this update out. rollback: go back to the last checkpoint
    and pass over the data that led to it.
    """

    nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    spike: Literal["off", "stop", "skip", "rollback"] = "off"
    deviations: float = Field(8.0, gt=0)
    """So many standard deviations above the mean of the loss, or of the gradient norm's logarithm, are a spike."""
    window: int = Field(128, ge=20)
    """Updates before it that an update is compared with."""
    limit: int = Field(10, ge=1)
    """Windows of data that may be passed over, and updates that may be left out in a row, before the run stops."""


def _switch(on: str) -> BeforeValidator:
    """Let true and false stand for words of a setting."""
    return BeforeValidator(lambda value: (on if value else "off") if isinstance(value, bool) else value)


class TrainSpec(Strict):
    """How long and how."""

    duration: DurationField = Duration(1000, "steps")
    global_batch: int = Field(32, ge=1)
    """Samples (packs, when packing) per update, over all processes and accumulation."""
    micro_batch: int | None = Field(None, ge=1)
    """Samples per forward pass of one process; by default the global batch divided by the processes."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: Annotated[
        Literal["off", "blocks", "network"],
        _switch("blocks"),
        WithJsonSchema({"enum": [False, True, "off", "blocks", "network"]}),
    ] = "off"
    """torch.compile, of each block by itself (true, too; then it starts fast, and engines gather and reduce a block at
    a time) or of the whole network. One without blocks is compiled whole."""
    guard: GuardSpec = GuardSpec()
    watchdog: float | None = Field(30.0, gt=0)
    """Minutes without a step (or part of an evaluation, or a save) after which a run is ended as hanging."""
    recompute: Annotated[
        Literal["off", "selective", "full"],
        _switch("full"),
        WithJsonSchema({"enum": [False, True, "off", "selective", "full"]}),
    ] = "off"
    """Activation checkpointing: compute a block again in the backward pass, all of it (full; true, too) or what is
    cheap, keeping the results of attention and of every second matrix product (selective)."""
    offload_activations: bool = False
    """Keep what a backward pass needs in host memory until then. On a CPU it changes nothing."""


class CheckpointSpec(Strict):
    """When to save, what to keep."""

    every: Interval | None = None
    """By default ten times in a run. The end of a stage and a signal always save."""
    minutes: float | None = Field(None, gt=0)
    """Save when so many minutes have passed since the last save, too."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints to keep; the last of a stage is always kept."""
    keep_every: Interval | None = None
    """Save at these steps too, and keep what is saved there."""
    best: str | None = None
    """Keep the best by this evaluation metric too, such as `loss` or `accuracy`."""
    asynchronous: bool = True
    """Write in the background, from a copy in host memory as large as what is written; one save at a time."""
    remote: str | None = None
    """A folder at any fsspec URL, such as `s3://bucket/runs`, that each checkpoint is copied to, under the run's name.
    A run without a checkpoint of its own goes on from the newest one there."""


LOWER_IS_BETTER = frozenset(
    ("loss", "perplexity", "error", "distance", "rmse", "mse", "mae", "nll", "nats", "bits", "fid", "kid", "wer", "cer")
)


class EvaluateSpec(Strict):
    """When to evaluate and draw samples, and when to stop for want of progress."""

    every: Interval | None = None
    """By default at the end of a stage only."""
    batch: int | None = Field(None, ge=1)
    """Samples per forward pass; by default the micro-batch."""
    samples: int = Field(64, ge=0)
    """How many samples to draw at each evaluation; 0 for none."""
    metric: str = "loss"
    """What patience, `plateau` and `checkpoint.best` look at."""
    patience: int | None = Field(None, ge=1)
    """Stop after so many evaluations without a better metric."""

    @staticmethod
    def better(metric: str, new: float, old: float) -> bool:
        """Say whether `new` is better; losses, errors and distances are better when they are lower, NaN never is.

        What a source is called, after the @, says nothing.
        """
        if math.isnan(new) or math.isnan(old):
            return not math.isnan(new)
        lower = not LOWER_IS_BETTER.isdisjoint(re.split(r"[^a-z]+", metric.partition("@")[0].lower()))
        return new < old if lower else new > old


class LogSpec(Strict):
    """What is written while a run goes on."""

    every: int = Field(10, ge=1)
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = []


class StageSpec(Open):
    """One part of a run: a name, and what differs from the recipe in this part."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")


class Recipe(Strict):
    """A whole recipe. `stages` holds overrides; `scaletrain.recipe.stages` gives the resolved recipe of each."""

    seed: int = Field(0, ge=0)
    objective: ObjectiveSpec
    networks: dict[str, NetworkSpec] = {}
    players: dict[str, PlayerSpec] = {}
    data: DataSpec
    train: TrainSpec = TrainSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    evaluate: EvaluateSpec = EvaluateSpec()
    log: LogSpec = LogSpec()
    stages: list[StageSpec] = []

    @property
    def evaluation_batch(self) -> int:
        """How many samples an evaluation takes at a time: not a matter of how many processes there are."""
        return self.evaluate.batch or self.train.micro_batch or min(self.train.global_batch, 64)

    @model_validator(mode="after")
    def _unique_stages(self) -> Recipe:
        names = [s.name for s in self.stages]
        if len(set(names)) != len(names):
            raise ValueError("two stages have the same name")
        return self


@dataclass(frozen=True)
class Stage:
    """One part of a run. `recipe` is what the whole recipe comes to in it, without stages."""

    name: str
    recipe: Recipe
