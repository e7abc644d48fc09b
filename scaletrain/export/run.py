"""From a run's newest checkpoint to folders that its networks' libraries load, in the form that was asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import nn

from scaletrain.checkpoint import reader
from scaletrain.checkpoint.layout import RECIPE
from scaletrain.config import NetworkSpec, QuantizeMethod
from scaletrain.errors import UserError, did_you_mean
from scaletrain.export.card import write_card
from scaletrain.export.gate import Gap, check, probe
from scaletrain.export.plain import outputs
from scaletrain.finished import FinishedStage
from scaletrain.networks._post_training import reloaded
from scaletrain.networks.build import base_of, build, network_module, own_base, save, unrounded
from scaletrain.shelf import Shelf

if TYPE_CHECKING:
    from scaletrain.diffusion.pipelines import Plan

DTYPES = ("float32", "bfloat16", "float16")
DRIFT = {
    "merge": 1e-4, "base": 0.5, "float16": 0.01, "bfloat16": 0.05,
    "int8": 0.1, "int8-dynamic": 0.1, "bnb-int8": 0.1, "int4": 0.5, "bnb-nf4": 0.5, "trained for": 1e-3,
}  # fmt: skip
"""How far a change of form may move the logits, as a part of the largest: beyond it something else is wrong.

base: a merged adapter's base, which was quantised in training and no longer is. trained for: the quantisation of
networks that were trained with it.
"""


@dataclass(frozen=True)
class Form:
    """In which form weights are written; by default as they were trained.

    group: of int4, the weights that share a scale; by default those that the network was trained for, or 32.
    """

    merge: bool = False
    dtype: str | None = None
    quantize: QuantizeMethod | None = None
    group: int | None = None

    def __post_init__(self) -> None:
        for option, value, known in (
            ("dtype", self.dtype, DTYPES),
            ("quantize", self.quantize, get_args(QuantizeMethod)),
        ):
            if value is not None and value not in known:
                raise UserError(f"--{option} {value}: it is one of {', '.join(known)}.{did_you_mean(value, known)}")
        if self.group is not None and self.quantize != "int4":
            raise UserError("--group is for int4.")

    @property
    def plain(self) -> bool:
        """Whether nothing is asked for."""
        return not (self.merge or self.dtype or self.quantize)


@dataclass(frozen=True)
class Written:
    """A folder, and what is known of it: how it was compared, and what the user is to be told."""

    path: Path
    notes: tuple[str, ...] = ()


@dataclass
class _Network:
    """A network on its way out. module: in the form that is written; kind: its class in transformers, if it has one."""

    name: str
    spec: NetworkSpec
    module: Any
    kind: str | None
    drifts: list[str] = field(default_factory=list)

    @property
    def adapted(self) -> bool:
        return hasattr(self.module, "peft_config")


def export_run(folder: Path, destination: Path, form: Form | None = None) -> list[Written]:
    """Write every trained network of the newest checkpoint, averaged where an average is kept, to `destination/NAME`,
    and frozen ones that they are of no use without.

    transformers, diffusers and peft load the folders as they are. Each is loaded back, by the libraries alone where
    they have the network, and compared, before it gets its name. Raises UserError when the destination is not empty or
    the form is none for these networks, RuntimeError when what was written is not what was trained.
    """
    form = form or Form()
    run = FinishedStage.open(folder)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UserError(f"{destination} is a file, or not empty: choose a new folder.")
    run.restore()
    specs = {k: NetworkSpec.model_validate(v) for k, v in reader.manifest(run.checkpoint)["networks"].items()}
    trained = {name: spec for name, spec in specs.items() if not spec.frozen or name in run.objective.companions}
    _check_form(trained, form)
    written: list[Written] = []
    for name, spec in trained.items():
        written += _export(run, _open(run, name, spec), form, destination)
    shutil.copy(folder / RECIPE, destination / RECIPE)
    return written


def _open(run: FinishedStage, name: str, spec: NetworkSpec) -> _Network:
    from transformers import PreTrainedModel

    module = Shelf(run.folder).open(run.checkpoint, name).eval()
    inner = _inner(module)
    return _Network(name, spec, module, type(inner).__name__ if isinstance(inner, PreTrainedModel) else None)


def _check_form(trained: Mapping[str, NetworkSpec], form: Form) -> None:
    """Raise UserError for a form that none of the networks can have. Those that no library has stay as they are."""
    theirs = {n: s for n, s in trained.items() if hasattr(network_module(str(s.type), f"networks.{n}"), "load")}
    adapted = [name for name, spec in theirs.items() if spec.adapter]
    names = ", ".join(f"`{name}`" for name in trained)
    if not (theirs or form.plain):
        raise UserError(f"{names}: not of transformers, and exported as they are: leave the options out.")
    if form.merge and not (adapted or form.quantize):
        raise UserError(f"--merge: {names}: there is no adapter to merge.")
    if form.dtype and adapted and not (form.merge or form.quantize):
        raise UserError(f"--dtype: `{adapted[0]}` is an adapter, which peft reads in float32: say --merge, too.")


def _export(run: FinishedStage, network: _Network, form: Form, destination: Path) -> list[Written]:
    """Write one network, and the base of its adapter where that is no folder of others. All have names, or none."""
    name = network.name
    hidden, base = destination / f".unproved-{name}", destination / f"{name}-base"
    try:
        if network.kind:
            notes = _prove(run, network, form, hidden, base)
        elif plan := run.objective.pipeline(name):
            notes = _prove_pipeline(run, network, form, plan, hidden)
        else:
            notes = _prove_tensors(run, network, hidden)
        hidden.rename(destination / name)
    except BaseException as error:
        for left in (hidden, base):
            shutil.rmtree(left, ignore_errors=True)
        if isinstance(error, RuntimeError):
            raise RuntimeError(f"export of {name}: {error}. It was not exported.") from error
        raise
    return [*([Written(base)] if base.exists() else []), Written(destination / name, tuple(notes))]


def _prove(run: FinishedStage, network: _Network, form: Form, hidden: Path, base_folder: Path) -> list[str]:
    """Write a network of transformers to `hidden`; returns what there is to tell of it. Raises RuntimeError."""
    assert network.kind is not None
    asked = probe(run, network.name, _inner(network.module))
    if asked is None and not form.plain:
        raise UserError(f"network `{network.name}` takes no tokens to compare it on: it is exported without options.")
    if asked is None:
        return _prove_tensors(run, network, hidden)
    notes = []
    trained = outputs(network.module, asked.inputs)
    spec = network.spec
    if spec.qat:
        unrounded(network.module)
        if form.quantize == spec.qat.type and form.group in (None, spec.qat.shared):
            form = replace(form, group=spec.qat.shared)
            network.drifts.append("trained for")
        else:
            trained = outputs(network.module, asked.inputs)
            notes.append(f"trained for {spec.qat.type}, and not in it: --quantize {spec.qat.type} makes it so")
    if network.adapted and (form.merge or form.quantize):
        network.drifts.append("base" if getattr(_inner(network.module), "is_quantized", False) else "merge")
        network.module = _merged(network, run, hidden)
    base = _write(run, network, hidden, base_folder)
    if form.dtype or form.quantize:
        network.module = reloaded(network.module, hidden, form.dtype, form.quantize, form.group)
        _write(run, network, hidden, base_folder)
        if form.dtype and form.dtype != spec.dtype:
            network.drifts.append(form.dtype)
        if form.quantize and "trained for" not in network.drifts:
            network.drifts.append(form.quantize)
    expected = outputs(network.module, asked.inputs) if network.drifts else trained
    gap, found = check(hidden, network.kind, base, network.module, expected, asked)
    notes.append(f"loaded by the library alone, on {asked.source}: max |difference| of logits {gap}")
    if network.drifts:
        drift, limit = Gap.between(found, trained), sum(DRIFT[why] for why in network.drifts)
        notes.append(f"from what was trained ({', '.join(network.drifts)}): {drift}, at most {limit:g} allowed")
        if drift.part > limit:
            raise RuntimeError(f"{', '.join(network.drifts)} moved the logits by {drift}, more than {limit:g}")
    write_card(hidden, run, network.spec, network.kind, base, notes)
    return notes


def _prove_pipeline(run: FinishedStage, network: _Network, form: Form, plan: Plan, hidden: Path) -> list[str]:
    """Write a denoiser as a pipeline of diffusers; returns what there is to tell of it. Raises RuntimeError."""
    from scaletrain.export.pipeline import snippet, write_pipeline

    if form.dtype or form.quantize:
        raise UserError("--dtype, --quantize: a pipeline is exported as it was trained, and loaded in another form.")
    if network.adapted and form.merge:
        network.module = _merged(network, run, hidden)
    if not hasattr(_inner(network.module), "save_pretrained") or (network.adapted and plan.source is None):
        return _prove_tensors(run, network, hidden)
    if network.adapted and (network.spec.config.get("guidance") or _own_base(run, network)):
        raise UserError(f"network `{network.name}`: its adapter goes over other weights than its pipeline's: --merge.")
    notes = write_pipeline(network.module, network.spec, plan, hidden)
    write_card(hidden, run, network.spec, None, None, notes, snippet(network.module, plan))
    return notes


def _inner(module: Any) -> Any:
    return module.get_base_model() if hasattr(module, "peft_config") else module


def _merged(network: _Network, run: FinishedStage, place: Path) -> nn.Module:
    """Fold an adapter into its base, in full precision; used up. Raises UserError for one that cannot be."""
    module = network.module
    if not hasattr(module.base_model, "merge_and_unload"):
        raise UserError(f"network `{network.name}`: its kind of adapter cannot be merged: export it without.")
    if getattr(_inner(module), "is_quantized", False):
        from peft import PeftModel

        save(module, network.spec, place)
        spec = network.spec.model_copy(update={"adapter": None, "quantize": None})
        module = PeftModel.from_pretrained(build(network.name, spec, Shelf(run.folder).base(spec)), str(place)).eval()
        shutil.rmtree(place)
    whole: nn.Module = module.merge_and_unload(safe_merge=True)
    return whole.eval()


def _write(run: FinishedStage, network: _Network, folder: Path, base_folder: Path) -> dict[str, Any] | None:
    """Write a network with all that belongs to it. Returns, for an adapter, how what it goes over is loaded."""
    shutil.rmtree(folder, ignore_errors=True)
    save(network.module, network.spec, folder)
    run.objective.save_assets(network.name, folder)
    if not network.adapted:
        return None
    inner = _inner(network.module)
    if inner.can_generate():
        inner.generation_config.save_pretrained(folder)
    own, spec = _own_base(run, network), network.spec
    if own is not None:
        save(*own, base_folder)
        path, options = str(base_folder.resolve()), {}
    else:
        path = str(network.module.peft_config["default"].base_model_name_or_path)
        path = str(Path(path).resolve()) if Path(path).is_dir() else path
        options = {key: getattr(inner.config, key) for key in spec.config if key != "model_type"}
        options["dtype"] = spec.dtype
        quantised = getattr(inner.config, "quantization_config", None)
        if quantised is not None:
            plainly = quantised if isinstance(quantised, dict) else quantised.to_dict()
            options["quantization_config"] = json.loads(json.dumps(plainly))  # enumerations as their names
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": path}, indent=2) + "\n")
    return {"path": path, "options": options}


def _own_base(run: FinishedStage, network: _Network) -> tuple[nn.Module, NetworkSpec] | None:
    """Return what an adapter goes over, where that is no folder of others as it is.

    That is the network of another stage or run, which may remove its checkpoints and holds weights that are not
    averaged; or a folder's with new tokens, or with other adapters folded in.
    """
    shelf, home = Shelf(run.folder), network.spec
    while home.source and shelf.spec(home.source).adapter:  # where the adapter was begun
        home = shelf.spec(home.source)
    if own_base(network.name, home):
        return base_of(network.name, home), home
    origin = shelf.base(network.spec)
    if origin is None or hasattr(origin, "peft_config"):
        return None
    return origin, shelf.spec(str(network.spec.source))


def _prove_tensors(run: FinishedStage, network: _Network, folder: Path) -> list[str]:
    """Write a network that no library calls as it is, and compare its tensors with what this package reads back."""
    save(network.module, network.spec, folder)
    run.objective.save_assets(network.name, folder)
    base = Shelf(run.folder).base(network.spec) if network.spec.adapter else None
    loaded = build(network.name, network.spec, base, folder)
    # What peft put aside for a module that is trained whole is never used, and drawn anew at each load.
    first, second = (
        {k: v for k, v in module.state_dict().items() if ".original_module." not in k}
        for module in (network.module, loaded)
    )
    if first.keys() != second.keys():
        raise RuntimeError(f"tensors lost or gained: {sorted(first.keys() ^ second.keys())[:8]}")
    for key, value in first.items():
        if value.numel() == 0 or not torch.equal(value, second[key]):
            raise RuntimeError(f"`{key}` is empty or differs after loading it back")
    write_card(folder, run, network.spec, network.kind, None, notes := ["every tensor reads back bit for bit"])
    return notes
