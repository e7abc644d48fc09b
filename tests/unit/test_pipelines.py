"""Pipelines of diffusers as teachers: read, called, distilled and exported as their own library would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from scaletrain.config import NetworkSpec
from scaletrain.diffusion.denoiser import Denoiser, Guidance
from scaletrain.diffusion.path import Discrete, Flow
from scaletrain.diffusion.pipelines import Pipeline, Plan, reading_of, scheduler_of
from scaletrain.diffusion.solvers import sample
from scaletrain.errors import UserError
from scaletrain.export import pipeline as exporting
from scaletrain.export import plain_pipeline as plain
from scaletrain.networks import diffusers_model as networks
from scaletrain.networks.build import build, outline, save
from scaletrain.recipe import load
from tests.unit.diffusers_pipelines import COUNT, FAMILIES, SIDE, STEPS, TOKENS, Pipes, distil, texts, write_data

diffusers = pytest.importorskip("diffusers")

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def plan_of(folder: Path) -> Plan:
    source = Pipeline.open(str(folder))
    assert source is not None
    signature = source.signature((SIDE, SIDE))
    assert signature is not None
    scheduler = scheduler_of(signature.reading, False, source.part("scheduler"))
    assert scheduler is not None
    return Plan(source, scheduler, signature, STEPS, lambda noise: {}, lambda network: lambda noise, steps, told: noise)


def told_of(plan: Plan, family: str) -> dict[str, Tensor]:
    told = texts(family)
    if plan.signature.condition == "label":
        told["label"] = torch.tensor([7, 3])
    return told | {k: torch.tensor(v).expand(COUNT, -1) for k, v in plan.signature.fixed.items()}


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_samples_are_those_of_the_pipeline_itself(family: str, guidance: float, pipes: Pipes) -> None:
    folder, pipe = pipes(family)
    plan = plan_of(folder)
    pipe.scheduler = getattr(diffusers, plan.scheduler["_class_name"]).from_config(plan.scheduler)
    network = networks.load(str(folder), networks.Config(), torch.float32)
    noise = torch.randn(COUNT, *plan.signature.shape, generator=torch.Generator().manual_seed(0))
    told = told_of(plan, family)
    denoiser, inputs = Denoiser(network, plan.signature.reading).given(**told), exporting._inputs(plan, noise, told)
    options = exporting._options(plan, {}) | {"guidance_scale": guidance, "negative_prompt": None}
    if guidance > 1 and plan.signature.guidance:
        denoiser = denoiser.given(guidance=torch.tensor(guidance))
    elif guidance > 1 and plan.signature.dropped:
        null = {k: v[0] for k, v in texts(family).items()} or {"label": torch.tensor(1000)}
        denoiser = denoiser.under(Guidance(guidance, null))
        inputs |= {f"negative_{k}": v.expand(COUNT, *v.shape) for k, v in null.items()}
    with torch.no_grad():
        ours = exporting._as_given(plan, sample(denoiser, noise, STEPS))
    theirs = plain.samples(pipe, inputs, 0, options)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_is_saved_in_the_layout_that_it_came_in(family: str, pipes: Pipes, tmp_path: Path) -> None:
    folder, pipe = pipes(family)
    network = build("model", NetworkSpec(type="diffusers_model", path=str(folder)))
    save(network, NetworkSpec(type="diffusers_model"), tmp_path)
    theirs = pipe.components.get("unet") or pipe.transformer
    back, info = type(theirs).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    for key, value in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[key], value)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == type(theirs).__name__


@pytest.mark.parametrize("guidance", [False, True])
def test_an_outline_has_the_names_and_shapes_of_the_network(guidance: bool, pipes: Pipes) -> None:
    spec = NetworkSpec(
        type="diffusers_model", path=str(pipes("stable_diffusion")[0]), config={"guidance": True} if guidance else {}
    )
    whole, empty = build("model", spec), outline("model", spec)
    assert {k: v.shape for k, v in empty.state_dict().items()} == {k: v.shape for k, v in whole.state_dict().items()}
    assert all(p.is_meta for p in empty.parameters())


# --- how they are read ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["DDPM", "DDIM", "PNDM", "DPMSolverMultistep", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "LCM"],
)
@pytest.mark.parametrize(("theirs", "ours"), [("epsilon", "eps"), ("v_prediction", "v"), ("sample", "x0")])
def test_a_schedulers_betas_and_prediction_are_a_reading(name: str, theirs: str, ours: str) -> None:
    reading = reading_of({"_class_name": f"{name}Scheduler", "prediction_type": theirs, **BETAS})
    assert reading is not None
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    assert isinstance(reading.path, Discrete)
    torch.testing.assert_close(
        torch.tensor(reading.path.alphas_cumprod, dtype=torch.float64), torch.cumprod(1 - betas, 0), rtol=1e-4, atol=0
    )
    assert reading.prediction == ours
    assert reading.path.told(torch.tensor([1.0, 0.001])).tolist() == pytest.approx([999, 0], abs=1e-3)


def test_a_schedulers_flow_is_a_reading_with_its_shift() -> None:
    plain = reading_of({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    assert plain is not None
    assert (plain.path, plain.prediction) == (Flow(shift=3.0), "velocity")
    solver = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 2.0}
    other = reading_of({"_class_name": "DPMSolverMultistepScheduler", **solver})
    assert other is not None
    assert other.path == Flow(shift=2.0)
    # The shift of Flux for 1024 pixels, 4096 tokens, is e^1.15.
    flux = reading_of({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, tokens=4096)
    assert flux is not None
    assert isinstance(flux.path, Flow)
    assert flux.path.shift == pytest.approx(2.718281828**1.15)


def test_a_schedule_that_ends_without_signal_is_read(pipes: Pipes) -> None:
    folder, _ = pipes("stable_diffusion_xl")
    path = plan_of(folder).signature.reading.path
    assert isinstance(path, Discrete)
    theirs = diffusers.DDIMScheduler.from_pretrained(folder, subfolder="scheduler").alphas_cumprod
    assert theirs[-1] == 0 < path.alphas_cumprod[-1] < 1e-9
    assert path.alphas_cumprod[:-1] == theirs[:-1].tolist()


def test_a_schedule_of_no_pipeline_is_written_by_its_betas() -> None:
    known = reading_of({"_class_name": "DDPMScheduler"})
    assert known is not None
    written = scheduler_of(known, False, {})
    assert written is not None
    again = diffusers.DDIMScheduler.from_config(written).alphas_cumprod
    torch.testing.assert_close(again, torch.tensor(known.path.alphas_cumprod), rtol=1e-4, atol=0)  # type: ignore[union-attr]


@pytest.mark.parametrize("config", [{"_class_name": "EDMEulerScheduler"}, {"_class_name": "Of"}, {}])
def test_other_schedulers_are_not_guessed_at(config: dict[str, Any]) -> None:
    assert reading_of(config) is None


# --- what they are told -----------------------------------------------------------------------------------------------


def test_guidance_that_is_told_is_told_as_pipelines_do(pipes: Pipes) -> None:
    _, pipe = pipes("stable_diffusion")
    scales = torch.tensor([1.0, 4.5, 8.0])
    expected = pipe.get_guidance_scale_embedding(scales - 1, embedding_dim=256)
    torch.testing.assert_close(networks.guidance_waves(scales, 256), expected)


@pytest.mark.parametrize("family", ["stable_diffusion", "flux"])
def test_a_network_that_is_told_guidance_at_first_answers_as_before(family: str, pipes: Pipes, tmp_path: Path) -> None:
    folder, _ = pipes(family)
    if family == "flux":
        saved_without = FAMILIES["flux"](guidance=False)  # type: ignore[call-arg]
        saved_without.save_pretrained(tmp_path)
        folder = tmp_path
    before = networks.load(str(folder), networks.Config(), torch.float32)
    after = networks.load(str(folder), networks.Config(guidance=True), torch.float32)
    z, t, told = torch.randn(COUNT, 4, SIDE, SIDE), torch.tensor([0.9, 0.2]), texts(family)
    guidance = torch.tensor([2.0, 7.0])
    with torch.no_grad():
        torch.testing.assert_close(after(z, t, guidance=guidance, **told), before(z, t, **told))
    place = after.get_parameter(after.begun[0])
    torch.nn.init.normal_(place)
    with torch.no_grad():
        assert not torch.allclose(after(z, t, guidance=guidance, **told), before(z, t, **told))


def test_what_stands_for_no_text_is_what_the_encoder_says_of_the_empty_prompt(pipes: Pipes, tmp_path: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "b</w>": 3}
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path, model_max_length=TOKENS)
    settings = {"hidden_size": 12, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = CLIPTextConfig(vocab_size=4, max_position_embeddings=TOKENS, **settings, **special)
    encoder = CLIPTextModel(config).eval()
    _, pipe = pipes("stable_diffusion")
    parts = {**pipe.components, "tokenizer": tokenizer, "text_encoder": encoder}
    type(pipe)(**parts, requires_safety_checker=False).save_pretrained(tmp_path / "pipe")
    source = Pipeline.open(str(tmp_path / "pipe"))
    assert source is not None
    with torch.no_grad():
        expected = encoder(torch.tensor([[0, 1, 1, 1, 1, 1]])).last_hidden_state
        torch.testing.assert_close(source.null()["prompt_embeds"], expected[0])
        expected = encoder(torch.tensor([[0, 2, 3, 1, 1, 1]])).last_hidden_state
        torch.testing.assert_close(source.encode(["a b"])["prompt_embeds"], expected)


@pytest.mark.parametrize(
    ("family", "config", "words"),
    [
        ("stable_diffusion_3", {"guidance": True}, "cannot be told the scale of guidance"),
        ("stable_diffusion", {"target": True}, "cannot be told the time to go to"),
        ("stable_diffusion", {"classes": 10}, "is told no classes"),
        ("dit", {"classes": 10}, "classes is 10, and the network knows 1000"),
        ("dit", {"num_layers": 3}, "num_layers"),
        ("dit", {"class_name": "UNet2DModel"}, "holds a DiTTransformer2DModel"),
    ],
)
def test_what_a_network_cannot_be_told_is_said(family: str, config: dict[str, Any], words: str, pipes: Pipes) -> None:
    with pytest.raises(UserError, match=words):
        networks.load(str(pipes(family)[0]), networks.Config(**config), torch.float32)


def test_a_folder_without_a_denoiser_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no denoiser of diffusers"):
        networks.load(str(tmp_path), networks.Config(), torch.float32)


def test_new_networks_are_made_by_their_class_and_the_data() -> None:
    options = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
    ways = {"down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"]}
    config = networks.Config(
        class_name="UNet2DModel", time_scale=1000, channels=3, height=8, width=8, classes=5, **options, **ways
    )
    network = networks.build(config)
    z, t = torch.randn(2, 3, 8, 8), torch.tensor([0.1, 0.9])
    found = network(z, t, label=torch.tensor([4, 5]))  # 5: none
    assert found.shape == z.shape
    theirs = diffusers.UNet2DModel.from_config(network.config)
    theirs.load_state_dict(network.state_dict())
    torch.testing.assert_close(found, theirs(z, 1000 * t, class_labels=torch.tensor([4, 5])).sample)
    with pytest.raises(UserError, match=r"layers_per_blok.*layers_per_block"):
        networks.build(networks.Config(class_name="UNet2DModel", layers_per_blok=2))


# --- distilled and exported -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "unconditional"])
def test_a_pipeline_is_distilled_and_exported_as_one(family: str, pipes: Pipes, tmp_path: Path) -> None:
    from scaletrain.export.run import export_run

    folder, before = pipes(family)
    run = distil(folder, write_data(tmp_path, family, (4, SIDE, SIDE)), tmp_path)
    (written,) = export_run(run, tmp_path / "out")
    assert "4 steps from the same noise" in written.notes[0]
    pipe = plain.load(str(written.path), None)
    assert type(pipe) is type(before)
    part = "unet" if "unet" in pipe.components else "transformer"
    old, new = (dict(getattr(p, part).named_parameters()) for p in (before, pipe))
    assert old.keys() == new.keys()
    assert any(not torch.equal(old[key], new[key]) for key in old)
    assert torch.equal(next(before.vae.parameters()), next(pipe.vae.parameters()))
    # What was not trained samples something else: the gate can tell.
    pipe.register_modules(**{part: getattr(before, part)})
    plan = plan_of(folder)
    noise = torch.randn(COUNT, *plan.signature.shape, generator=torch.Generator().manual_seed(0))
    inputs = exporting._inputs(plan, noise, told_of(plan, family))
    again = plain.load(str(written.path), None)
    ours, theirs = (plain.samples(p, dict(inputs), 0, exporting._options(plan, {})) for p in (again, pipe))
    assert exporting.Gap.between(ours, theirs).part > exporting.EXACT


@pytest.mark.slow
@pytest.mark.parametrize("family", ["stable_diffusion", "flux"])
def test_a_lora_student_is_exported_as_a_lora(
    family: str, pipes: Pipes, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The first is loaded in a process of its own, by diffusers alone."""
    from scaletrain.export.run import Form, export_run

    if family != "stable_diffusion":
        request.getfixturevalue("here")
    folder, _ = pipes(family)
    adapter = {"type": "lora", "r": 2, "alpha": 6, "targets": ["to_q", "to_v"]}
    data = write_data(tmp_path, family, (4, SIDE, SIDE))
    run = distil(folder, data, tmp_path, networks={"student": {"adapter": adapter}})
    (written,) = export_run(run, tmp_path / "out")
    assert "as a LoRA" in written.notes[0]
    names = {p.name for p in written.path.iterdir()}
    assert names == {"README.md", "pytorch_lora_weights.safetensors", "scheduler"}
    assert "load_lora_weights" in (written.path / "README.md").read_text()
    if family == "flux":
        (whole,) = export_run(run, tmp_path / "whole", Form(merge=True))
        assert "as a pipeline" in whole.notes[0]


@pytest.mark.slow
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("clip", [False, True])
def test_a_new_network_is_exported_as_an_unconditional_pipeline(clip: bool, tmp_path: Path) -> None:
    from scaletrain.export.run import export_run
    from scaletrain.runs import train

    known = reading_of({"_class_name": "DDPMScheduler"})
    assert known is not None
    reading = {"path": known.path.model_dump(), "prediction": "eps" if clip else "v", "clip": clip}
    config = {
        "class_name": "UNet2DModel", "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2,
    }  # fmt: skip
    recipe = {
        "objective": {"type": "diffusion", "steps": STEPS, "weighting": "plain", **reading},
        "networks": {"model": {"type": "diffusers_model", "config": config}},
        "players": {"model": {"optimizer": {"type": "adam", "lr": 1e-3}}},
        "data": {"train": "sklearn:digits"},
        "train": {"duration": "3 steps", "global_batch": 8},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run = train(load(str(tmp_path / "recipe.yaml"), []), "run", tmp_path, observers=[])
    (written,) = export_run(run, tmp_path / "out")
    assert "as a pipeline" in written.notes[0]
    images = plain.samples(plain.load(str(written.path), None), {}, 0, {"num_inference_steps": 2, "batch_size": 3})
    assert images.shape == (3, 1, 8, 8)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_a_teacher_of_an_unknown_schedule_asks_for_it_by_key(pipes: Pipes, tmp_path: Path) -> None:
    _, pipe = pipes("stable_diffusion")
    pipe.save_pretrained(tmp_path / "pipe")
    (tmp_path / "pipe/scheduler/scheduler_config.json").write_text('{"_class_name": "EDMEulerScheduler"}')
    data = write_data(tmp_path, "stable_diffusion", (4, SIDE, SIDE))
    with pytest.raises(UserError, match=r"objective\.path"):
        distil(tmp_path / "pipe", data, tmp_path)


def test_latents_of_another_autoencoder_are_refused(pipes: Pipes, tmp_path: Path) -> None:
    data = write_data(tmp_path, "stable_diffusion", (3, SIDE, SIDE))
    with pytest.raises(UserError, match="3 channels, and the network denoises 4"):
        distil(pipes("stable_diffusion")[0], data, tmp_path)


def test_guidance_asks_for_what_stands_for_no_text_where_no_encoder_says(pipes: Pipes, tmp_path: Path) -> None:
    folder, _ = pipes("stable_diffusion")
    data = write_data(tmp_path, "stable_diffusion", (4, SIDE, SIDE))
    with pytest.raises(UserError, match=r"objective\.no_text"):
        distil(folder, data, tmp_path, objective={"guidance": 3.0})


def test_guidance_takes_what_stands_for_no_text_from_a_file(pipes: Pipes, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder, _ = pipes("stable_diffusion")
    data = write_data(tmp_path, "stable_diffusion", (4, SIDE, SIDE))
    save_file({"prompt_embeds": torch.zeros(TOKENS, 12)}, tmp_path / "none.safetensors")
    settings = {"guidance": 3.0, "no_text": str(tmp_path / "none.safetensors")}
    run = distil(folder, data, tmp_path, objective=settings)
    own = run / "latest/networks/student"
    assert sorted(p.relative_to(own).as_posix() for p in own.rglob("*.safetensors")) == [
        "diffusion_pytorch_model.safetensors",
        "texts/none.safetensors",
        "texts/some.safetensors",
    ]
    save_file({"prompt_embeds": torch.zeros(TOKENS + 1, 12)}, tmp_path / "none.safetensors")
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match=r"in the data it is \(6, 12\)"):
        distil(folder, data, tmp_path / "other", objective=settings)
