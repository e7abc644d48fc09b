"""Denoisers as pipelines of diffusers, or as LoRAs for them, proved by samples from the same noise."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from scaletrain.config import NetworkSpec
from scaletrain.diffusion.pipelines import ALONE, INDEX, Plan
from scaletrain.errors import UserError
from scaletrain.export import plain_pipeline
from scaletrain.export.gate import Gap, Probe, elsewhere
from scaletrain.networks.build import save
from scaletrain.networks.diffusers_model import packed, unpacked

COUNT, SEED = 2, 0
"""How many samples are compared, and what their noise is drawn from."""
EXACT = 1e-3
"""Largest difference, as a part of the largest value: what rounding comes to over some steps."""


def write_pipeline(module: Any, spec: NetworkSpec, plan: Plan, folder: Path) -> list[str]:
    """Write a network into a pipeline's folder, or an adapter as a LoRA that goes over one, and compare its samples.

    Returns what there is to tell. Raises RuntimeError when diffusers alone samples something else from the folder.
    """
    adapted = hasattr(module, "peft_config")
    if adapted:
        _write_lora(module, spec, plan, folder)
    else:
        _write_whole(module, spec, plan, folder)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.parent.mkdir(parents=True)
    scheduler.write_text(json.dumps(plan.scheduler, indent=2) + "\n")

    torch.manual_seed(SEED)  # of all noise: what samples are begun with, and what is added between steps
    noise = torch.randn(COUNT, *plan.signature.shape)
    told = plan.conditions(noise)
    with torch.no_grad(), _DrawnPacked() if _packs(plan) else nullcontext():
        expected = plan.sampler(module)(noise, plan.steps, told)
    base = str(plan.source.folder.resolve()) if adapted and plan.source else None
    asked = {"folder": str(folder.resolve()), "base": base, "seed": SEED, "options": _options(plan, told)}
    found, _ = elsewhere(asked, Probe(_inputs(plan, noise, told), "noise"), plain_pipeline)
    gap = Gap.between(found, _as_given(plan, expected))
    if gap.part > EXACT:
        raise RuntimeError(f"sampled by diffusers alone it gives other samples: max |difference| {gap}")
    what = "a LoRA over the teacher's pipeline" if adapted else "a pipeline"
    return [
        f"loaded by diffusers alone as {what}: {COUNT} samples of {plan.steps} steps from the same noise, "
        f"max |difference| {gap}"
    ]


def snippet(module: Any, plan: Plan) -> list[str]:
    """Return how what was written is used."""
    scheduler, steps = plan.scheduler["_class_name"], plan.steps
    lines = ["from diffusers import DiffusionPipeline", ""]
    if hasattr(module, "peft_config"):
        assert plan.source is not None
        lines[0] = f"from diffusers import DiffusionPipeline, {scheduler}"
        lines.append(f'pipe = DiffusionPipeline.from_pretrained("{plan.source.path}")')
        lines.append(f'pipe.scheduler = {scheduler}.from_pretrained("FOLDER", subfolder="scheduler")')
        lines.append('pipe.load_lora_weights("FOLDER")')
    else:
        lines.append('pipe = DiffusionPipeline.from_pretrained("FOLDER")')
    options = {
        k: v
        for k, v in _options(plan, plan.conditions(torch.zeros(1))).items()
        if k in ("num_inference_steps", "guidance_scale", "sigmas")
    }
    first = {"label": "class_labels=[0], ", "text": '"a prompt", '}.get(plan.signature.condition or "", "")
    if not first:
        options = {"num_inference_steps": steps}
        if plan.scheduler.get("clip_sample") and scheduler == "DDIMScheduler":
            options["use_clipped_model_output"] = True
    return [*lines, f"pipe({first}{', '.join(f'{k}={v!r}' for k, v in options.items())}).images[0]"]


def _write_whole(module: Any, spec: NetworkSpec, plan: Plan, folder: Path) -> None:
    """Write a network with the other parts of its pipeline; alone, as that of a pipeline without conditions."""
    index: dict[str, Any]
    if plan.source is None:
        from diffusers import __version__

        name, index = "unet", {"_diffusers_version": __version__, "unet": ["diffusers", type(module).__name__]}
    else:
        name, index = plan.source.denoiser, dict(plan.source.index)
        whole = plan.source.complete()
        for part in index:
            if (whole / part).is_dir() and part not in (name, "scheduler"):
                shutil.copytree(whole / part, folder / part)
    save(module, spec, folder / name)
    if plan.signature.condition is None and plan.scheduler["_class_name"] in ALONE:
        index["_class_name"] = ALONE[plan.scheduler["_class_name"]]
    index["scheduler"] = ["diffusers", plan.scheduler["_class_name"]]
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_lora(module: Any, spec: NetworkSpec, plan: Plan, folder: Path) -> None:
    """Write an adapter as diffusers' pipelines load it. Raises UserError for one that they do not."""
    import diffusers
    from peft import LoraConfig
    from safetensors.torch import load_file

    assert plan.source is not None
    kind: Any = getattr(diffusers, plan.source.index["_class_name"])
    if not hasattr(kind, "save_lora_weights") or module.peft_config["default"].peft_type != "LORA":
        raise UserError(f"a {kind.__name__} loads no adapter of this type: say --merge for a whole pipeline.")
    with tempfile.TemporaryDirectory() as place:  # as peft has it, which tells, too, what began with a part of W
        save(module, spec, Path(place))
        state = load_file(Path(place) / "adapter_model.safetensors")
        config = json.loads((Path(place) / "adapter_config.json").read_text())
    layers = {key.removeprefix("base_model.model."): value for key, value in state.items()}
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    part, settings = plan.source.denoiser, {key: value for key, value in config.items() if key in known}
    kind.save_lora_weights(folder, **{f"{part}_lora_layers": layers, f"{part}_lora_adapter_metadata": settings})


def _options(plan: Plan, told: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what a pipeline is called with, besides tensors, for samples that ours are told this of."""
    signature, steps = plan.signature, plan.steps
    factor = plan.source.factor if plan.source else 1
    found: dict[str, Any] = {
        "num_inference_steps": steps,
        "guidance_scale": float(told["guidance"][0]) if "guidance" in told else plan.guidance,
        "height": signature.shape[1] * factor,
        "width": signature.shape[2] * factor,
        "use_resolution_binning": False,
        "batch_size": COUNT,
        "use_clipped_model_output": True,
    }
    if plan.scheduler["_class_name"].startswith("FlowMatch"):  # by themselves, some pipelines take others
        found["sigmas"] = [1 - i / steps for i in range(steps)]
    return found | ({"negative_prompt": None} if plan.null else {})


def _inputs(plan: Plan, noise: Tensor, told: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under the names that pipelines have for them."""
    found = {name: told[name].contiguous() for name in plan.signature.texts}
    found |= {f"negative_{k}": v.expand(len(noise), *v.shape).contiguous() for k, v in plan.null.items()}
    found["latents"] = packed(noise).contiguous() if _packs(plan) else noise
    if "label" in told:
        found["class_labels"] = told["label"]
    return found


class _DrawnPacked(TorchFunctionMode):
    """Has noise like latents be drawn in the order that a pipeline of packed ones draws it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.randn_like:
            return func(*args, **(kwargs or {}))
        (z,) = args
        return unpacked(torch.randn(packed(z).shape, dtype=z.dtype), z.shape[2] // 2, z.shape[3] // 2)


def _packs(plan: Plan) -> bool:
    return plan.source is not None and str(plan.source.index["_class_name"]).startswith("Flux")


def _as_given(plan: Plan, x0: Tensor) -> Tensor:
    """Return our samples as the pipeline gives them: latents, or pictures where it gives no latents."""
    if _packs(plan):
        return packed(x0)
    if plan.signature.condition == "text":
        return x0
    if plan.signature.space == "latent":
        import diffusers

        assert plan.source is not None
        vae = diffusers.AutoencoderKL.from_pretrained(plan.source.folder, subfolder="vae")
        with torch.no_grad():
            x0 = vae.decode(x0 / vae.config.scaling_factor).sample
    return (x0 / 2 + 0.5).clamp(0, 1)
