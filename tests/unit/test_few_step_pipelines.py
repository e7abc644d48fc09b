"""Each family of pipelines distilled by methods that sample in few steps, exported, and sampled by diffusers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from scaletrain.config import Recipe, SourceSpec
from scaletrain.data.dataset import Dataset
from scaletrain.data.sources import open_rows
from scaletrain.diffusion.pipelines import Pipeline, Plan, scheduler_of
from scaletrain.export import pipeline as exporting
from scaletrain.export import plain_pipeline as plain
from scaletrain.export.run import Form, export_run
from scaletrain.networks import diffusers_model
from scaletrain.objectives.reflow import Objective
from scaletrain.recipe import objective_of
from tests.unit.diffusers_pipelines import COUNT, FAMILIES, SIDE, STEPS, Pipes, distil, texts, write_data
from tests.unit.objectives.prepared import prepared

diffusers = pytest.importorskip("diffusers")

CONDITIONAL = [family for family in FAMILIES if family != "unconditional"]
ADAM = {"optimizer": {"type": "adam", "lr": 1e-3}}
METHODS: dict[str, dict[str, Any]] = {
    "lcm": {"objective": {"type": "lcm"}},
    "dmd2": {"objective": {"type": "dmd2", "every": 2}, "players": {"fake_score": ADAM}},
    "criticised": {
        "objective": {"type": "dmd2", "every": 2, "adversarial": 0.1, "r1": 0.1},
        "players": {"fake_score": ADAM, "critic": ADAM},
        "networks": {"critic": {"config": {"features": [8, 8], "time_features": 16}}},
    },
    "adversarial": {
        "objective": {"type": "adversarial"},
        "players": {"critic": ADAM},
        "networks": {"critic": {"config": {"features": [8, 8], "time_features": 16}}},
    },
    "reflow": {"objective": {"type": "reflow", "teacher_steps": 3}},
}


def samples(pipe: Any, family: str, steps: int = STEPS) -> torch.Tensor:
    """Return what a pipeline of diffusers makes of random texts, or of some classes."""
    options = {"num_inference_steps": steps, "guidance_scale": 1.0, "height": 2 * SIDE, "width": 2 * SIDE}
    torch.manual_seed(2)
    inputs = {"class_labels": torch.tensor([7, 3])} if family == "dit" else texts(family)
    if family in ("stable_diffusion", "stable_diffusion_xl"):
        inputs["latents"] = torch.randn(COUNT, 4, SIDE, SIDE)
    return plain.samples(pipe, inputs, 0, {**options, "use_resolution_binning": False})


def part_of(pipe: Any) -> Any:
    return pipe.components.get("unet") or pipe.transformer


@pytest.mark.slow
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("method", ["lcm", "dmd2"])
@pytest.mark.parametrize("family", CONDITIONAL)
def test_every_family_is_distilled_exported_and_sampled(family: str, method: str, pipes: Pipes, tmp_path: Path) -> None:
    folder, before = pipes(family)
    run = distil(folder, write_data(tmp_path, family, (4, SIDE, SIDE)), tmp_path, **METHODS[method])
    written = {w.path.name: w for w in export_run(run, tmp_path / "out")}["student"]
    assert "samples of 4 steps from the same noise" in written.notes[0]
    pipe = plain.load(str(written.path), None)
    assert type(pipe) is type(before)
    flow = family in ("stable_diffusion_3", "flux")
    name = "FlowMatchEulerDiscreteScheduler" if flow else "LCMScheduler"
    assert type(pipe.scheduler).__name__ == name
    assert pipe.scheduler.config.get("stochastic_sampling", True)
    old, new = (dict(part_of(p).named_parameters()) for p in (before, pipe))
    assert any(not torch.equal(old[key], new[key]) for key in new)
    assert samples(pipe, family).isfinite().all()


@pytest.mark.slow
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("method", ["criticised", "adversarial", "reflow"])
@pytest.mark.parametrize("family", ["stable_diffusion", "flux", "pixart"])
def test_critics_and_pairs_have_texts_and_scales(family: str, method: str, pipes: Pipes, tmp_path: Path) -> None:
    folder, _ = pipes(family)
    changes = METHODS[method]
    if family == "flux":
        changes = {**changes, "objective": {**changes["objective"], "guidance": 3.5}}
    run = distil(folder, write_data(tmp_path, family, (4, SIDE, SIDE)), tmp_path, **changes)
    written = {w.path.name: w for w in export_run(run, tmp_path / "out")}["student"]
    assert "samples of 4 steps from the same noise" in written.notes[0]
    called = (written.path / "README.md").read_text()
    assert f"guidance_scale={3.5 if family == 'flux' else 1.0}" in called
    if method != "reflow":
        width = load_file(run / "latest/networks/critic/model.safetensors")["times.conditions.text.weight"].shape[1]
        assert width == (10 if family == "flux" else 12)


@pytest.mark.parametrize("family", ["stable_diffusion", "stable_diffusion_xl", "flux"])
def test_pairs_are_samples_of_the_pipeline_itself(family: str, pipes: Pipes, tmp_path: Path) -> None:
    """From the noise of each number, by the text of its row and, if it is told one, a scale of its own."""
    folder, pipe = pipes(family)
    data = write_data(tmp_path, family, (4, SIDE, SIDE), rows=3)
    teacher = {"type": "diffusers_model", "path": str(folder), "frozen": True}
    recipe = Recipe.model_validate({
        "objective": {"type": "reflow", "teacher_steps": STEPS},
        "networks": {"teacher": teacher, "student": {**teacher, "frozen": False}},
        "data": {"train": str(data)},
    })  # fmt: skip
    own = objective_of(recipe)
    assert isinstance(own, Objective)
    rows = prepared(own, open_rows([SourceSpec(path=str(data))]), None).train
    ahead = own.ahead()
    assert ahead is not None
    network = {"teacher": diffusers_model.load(str(folder), diffusers_model.Config(), torch.float32)}
    for part in ahead.missing():
        with torch.no_grad():
            ahead.do(network, torch.device("cpu"), part)
    assert isinstance(rows, Dataset)
    batch = rows.batch([2, 0, 1], np.zeros(3, np.uint64))
    source = Pipeline.open(str(folder))
    assert source is not None
    signature = own.signature
    scheduler = scheduler_of(signature.reading, False, source.part("scheduler"))
    assert scheduler is not None
    plan = Plan(source, scheduler, signature, STEPS, lambda noise: {}, lambda network: lambda noise, steps, told: noise)
    pipe.scheduler = getattr(diffusers, scheduler["_class_name"]).from_config(scheduler)
    columns = pq.read_table(data).to_pydict()
    if signature.guidance:
        assert len(batch["guidance"].unique()) == 3
    for i, row in enumerate((2, 0, 1)):
        told = {k: torch.tensor(columns[k])[row : row + 1] for k in signature.texts}
        told |= {"guidance": batch["guidance"][i : i + 1]} if signature.guidance else {}
        inputs, options = exporting._inputs(plan, batch["noise"][i : i + 1], told), exporting._options(plan, told)
        theirs = plain.samples(pipe, inputs, 0, options)
        ours = exporting._as_given(plan, batch["made"][i : i + 1])
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-4 * float(theirs.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lcm", "dmd2"])
def test_of_a_lora_student_the_adapter_alone_is_kept(
    method: str, pipes: Pipes, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """It is loaded over the teacher's pipeline by diffusers alone, the first in a process of its own."""
    if method != "lcm":
        request.getfixturevalue("here")
    folder, before = pipes("stable_diffusion")
    adapter = {"type": "lora", "r": 2, "alpha": 6, "targets": ["to_q", "to_v"]}
    changes = {**METHODS[method], "networks": {"student": {"adapter": adapter}}}
    run = distil(folder, write_data(tmp_path, "stable_diffusion", (4, SIDE, SIDE)), tmp_path, **changes)
    whole = sum(p.numel() for p in before.unet.parameters())
    for network in ("student", "fake_score") if method == "dmd2" else ("student",):
        held = run / "latest/networks" / network
        assert [p.relative_to(held).as_posix() for p in held.rglob("*.safetensors") if "texts" not in p.parts] == [
            "adapter_model.safetensors"
        ]
        state = load_file(held / "adapter_model.safetensors")
        assert all("lora_" in key for key in state)
        assert sum(v.numel() for v in state.values()) < whole / 20
    written = {w.path.name: w for w in export_run(run, tmp_path / "out")}["student"]
    assert "as a LoRA" in written.notes[0]
    assert {p.name for p in written.path.iterdir()} == {"README.md", "pytorch_lora_weights.safetensors", "scheduler"}
    assert all("lora_" in key for key in load_file(written.path / "pytorch_lora_weights.safetensors"))
    called = (written.path / "README.md").read_text()
    assert "LCMScheduler.from_pretrained" in called
    assert "load_lora_weights" in called
    if method != "lcm":
        merged = {w.path.name: w for w in export_run(run, tmp_path / "merged", Form(merge=True))}["student"]
        assert "as a pipeline" in merged.notes[0]
        found = (
            samples(plain.load(*where), "stable_diffusion")
            for where in ((str(written.path), str(folder)), (str(merged.path), None), (str(folder), None))
        )
        adapted, folded, without = found
        torch.testing.assert_close(adapted, folded, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(adapted, without, rtol=1e-2, atol=1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("family", [f for f in CONDITIONAL if f != "flux"])
def test_a_model_that_is_guided_by_two_calls_is_exported_with_its_scale(
    family: str, pipes: Pipes, tmp_path: Path
) -> None:
    folder, _ = pipes(family)
    null = {k: v[0] for k, v in texts(family).items()}
    objective = {"type": "diffusion", "dropped": 0.5, "guidance": 3.0}
    if null:
        save_file(null, tmp_path / "none.safetensors")
        objective |= {"no_text": str(tmp_path / "none.safetensors")}
    objective["condition"] = "text" if null else "label"
    networks = {"student": None, "teacher": None, "model": {"type": "diffusers_model", "path": str(folder)}}
    data = write_data(tmp_path, family, (4, SIDE, SIDE))
    players = {"student": None, "model": ADAM}
    run = distil(folder, data, tmp_path, objective=objective, networks=networks, players=players)
    (written,) = export_run(run, tmp_path / "out")
    assert "samples of 4 steps from the same noise" in written.notes[0]
    assert "guidance_scale=3.0" in (written.path / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_a_student_that_is_told_the_scale_is_a_teacher_in_turn(pipes: Pipes, tmp_path: Path) -> None:
    """Latent consistency at many scales; then distribution matching, whose networks are told them, too."""
    folder, _ = pipes("stable_diffusion")
    data = write_data(tmp_path, "stable_diffusion", (4, SIDE, SIDE))
    save_file({k: v[0] for k, v in texts("stable_diffusion").items()}, tmp_path / "none.safetensors")
    scaled = {"type": "lcm", "scales": [1.0, 4.0], "guidance": 2.0, "no_text": str(tmp_path / "none.safetensors")}
    run = distil(folder, data, tmp_path, objective=scaled)
    (first,) = export_run(run, tmp_path / "first")
    assert "guidance_scale=2.0" in (first.path / "README.md").read_text()
    (tmp_path / "next").mkdir()
    changes = {**METHODS["dmd2"], "objective": {**METHODS["dmd2"]["objective"], "guidance": 3.0}}
    run = distil(first.path, data, tmp_path / "next", **changes)
    second = {w.path.name: w for w in export_run(run, tmp_path / "second")}["student"]
    assert "samples of 4 steps from the same noise" in second.notes[0]
    assert "guidance_scale=3.0" in (second.path / "README.md").read_text()
    assert json.loads((second.path / "unet/config.json").read_text())["time_cond_proj_dim"] == 256


@pytest.mark.slow
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("options", "scheduler"),
    [({}, "LCM"), ({"clip": True}, "LCM"), ({"fresh": False}, "DDIM"), ({"highest": 0.5}, None), ({"steps": 3}, None)],
)
def test_a_consistency_model_without_conditions(
    options: dict[str, Any], scheduler: str | None, pipes: Pipes, tmp_path: Path
) -> None:
    folder, _ = pipes("unconditional")
    run = distil(folder, "sklearn:digits", tmp_path, objective={"type": "consistency", **options})
    (written,) = export_run(run, tmp_path / "out")
    if scheduler is None:  # which no scheduler of diffusers does
        assert "reads back bit for bit" in written.notes[0]
        return
    assert "samples of 4 steps from the same noise" in written.notes[0]
    assert json.loads((written.path / "model_index.json").read_text())["scheduler"][1] == f"{scheduler}Scheduler"
    assert "use_clipped_model_output" not in (written.path / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("family", ["stable_diffusion", "flux"])
def test_other_noise_or_times_are_told_from_ours(
    family: str, pipes: Pipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate can fail: of a scheduler with LCM's usual times, or none of the noise between steps."""
    from scaletrain.diffusion import pipelines

    folder, _ = pipes(family)
    run = distil(folder, write_data(tmp_path, family, (4, SIDE, SIDE)), tmp_path, **METHODS["lcm"])
    right = pipelines.scheduler_of
    wrong = {"original_inference_steps": 50} if family == "stable_diffusion" else {"stochastic_sampling": False}
    monkeypatch.setattr(pipelines, "scheduler_of", lambda *given: {**right(*given), **wrong})  # type: ignore[dict-item]
    with pytest.raises(RuntimeError, match="it gives other samples"):
        export_run(run, tmp_path / "out")
