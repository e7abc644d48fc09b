"""Denoisers of latents: pictures are encoded once and kept, samples are decoded, other autoencoders are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from scaletrain.config import NetworkSpec, SourceSpec
from scaletrain.data.sources import Rows, open_rows
from scaletrain.data.tables import ArrayTable
from scaletrain.diffusion.path import Cosine
from scaletrain.diffusion.reading import Reading
from scaletrain.diffusion.signature import Signature
from scaletrain.errors import UserError
from scaletrain.networks._latents import METADATA, Latents
from scaletrain.networks.build import build, save
from scaletrain.objectives import consistency, diffusion, reflow
from scaletrain.objectives.base import Data, Request
from tests.unit.objectives.denoising import ELSEWHERE, pictures, unprepared
from tests.unit.objectives.prepared import prepared

pytest.importorskip("diffusers")

SMALL = {"channels": 1, "features": [8, 8], "groups": 4, "latent_channels": 2}
OTHER = Latents(autoencoder="0123456789abcdef", name="another", scaling_factor=1.0, shift_factor=0.0)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALETRAIN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A trained autoencoder's."""
    spec = NetworkSpec(type="autoencoder_kl", config=SMALL)
    torch.manual_seed(0)
    module = build("autoencoder", spec)
    module.statistics.momentum = 1.0  # type: ignore[union-attr]
    module(torch.randn(32, 1, 4, 4))
    save(module, spec, tmp_path / "vae")
    return tmp_path / "vae"


def frozen(folder: Path) -> dict[str, Any]:
    return {"autoencoder": {"type": "autoencoder_kl", "path": str(folder), "frozen": True}}


def network(folder: Path) -> Any:
    return build("autoencoder", NetworkSpec(type="autoencoder_kl", path=str(folder), frozen=True)).eval()


def denoising(folder: Path, **options: Any) -> tuple[diffusion.Objective, Data]:
    objective = unprepared(diffusion, frozen(folder), **options)
    return objective, prepared(objective, pictures(), pictures(20))


def worked(objective: Any, networks: dict[str, Any]) -> None:
    ahead = objective.ahead()
    assert ahead.networks.keys() == networks.keys()
    with torch.no_grad():
        for part in ahead.missing():
            ahead.do(networks, torch.device("cpu"), part)
    assert ahead.missing() == []


def whole(dataset: Any) -> dict[str, Tensor]:
    return dataset.batch(range(len(dataset)), np.zeros(len(dataset), np.uint64))


def scaled(rows: Rows) -> Tensor:
    return torch.from_numpy(np.stack(list(rows.column("image")))).float()[:, None] / 127.5 - 1


def test_pictures_are_encoded_once_and_kept(folder: Path) -> None:
    objective, data = denoising(folder, condition="label")
    assert (objective.signature.space, objective.signature.shape) == ("latent", (2, 2, 2))
    assert objective.signature.reading.data_std == 1.0
    assert data.eval is not None
    with pytest.raises(UserError, match="is not there"):
        whole(data.train)
    worked(objective, {"autoencoder": network(folder)})
    for rows, dataset in ((pictures(), data.train), (pictures(20), data.eval)):
        found = whole(dataset)
        with torch.no_grad():
            expected = network(folder)(scaled(rows), "encode")
        torch.testing.assert_close(found["latent"], expected, rtol=1e-3, atol=1e-4)  # in half precision
        assert found["label"].tolist() == [int(label) for label in rows.column("label")]
    assert objective.facts() == {"networks.autoencoder": network(folder).latents("").autoencoder}
    again: Any = denoising(folder, condition="label")[0]
    assert not again.ahead().missing()
    (folder / "statistics.json").write_text(json.dumps({"mean": [0, 0], "variance": [1, 4], "batches": 1}))
    again = denoising(folder, condition="label")[0]
    assert again.ahead().missing()


def test_pictures_of_another_size_than_those_trained_on_are_refused(folder: Path) -> None:
    objective = unprepared(diffusion, frozen(folder))
    images = np.zeros((4, 8, 8), np.uint8)
    other = Rows([ArrayTable("other", {"image": images})])
    with pytest.raises(UserError, match=r"other row 0 is of \(1, 8, 8\).*set objective.size"):
        prepared(objective, pictures(), other)


def test_texts_stand_beside_latents(folder: Path) -> None:
    rows = pictures(6)
    embeds = np.random.default_rng(0).normal(size=(6, 3, 4)).astype(np.float32)
    columns = {"image": np.stack(list(rows.column("image"))), "prompt_embeds": embeds}
    objective = unprepared(diffusion, frozen(folder), condition="text")
    data = prepared(objective, Rows([ArrayTable("texts", columns)]), None)
    worked(objective, {"autoencoder": network(folder)})
    found = whole(data.train)
    np.testing.assert_array_equal(found["prompt_embeds"].numpy(), embeds)
    assert objective.told(found)["prompt_embeds"] is found["prompt_embeds"]


def test_latents_must_be_pictures_of_channels(tmp_path: Path) -> None:
    rows = Rows([ArrayTable("flat", {"latent": np.zeros((4, 3), np.float32)})])
    with pytest.raises(UserError, match=r"row 0: `latent` is of shape \(3,\); it should be \(C, H, W\)"):
        prepared(unprepared(diffusion, {}), rows, None)


def test_samples_are_decoded_and_the_network_comes_along(folder: Path) -> None:
    objective, _ = denoising(folder)
    latents = torch.randn(2, 2, 2, 2)

    def model(z: Tensor, t: Tensor) -> Tensor:
        return latents

    objective.sampler = lambda network: lambda noise, steps, told: latents  # type: ignore[method-assign]
    request = Request(2, torch.Generator().manual_seed(0))
    module = network(folder)
    with torch.no_grad():
        shown = objective.sample({"model": model, "autoencoder": module}, request).images  # type: ignore[dict-item]
        expected = module(latents, "decode").clamp(-1, 1) / 2 + 0.5
    assert shown is not None
    torch.testing.assert_close(shown, expected)
    assert objective.networks()["autoencoder"].frozen
    assert objective.pipeline("model") is None  # diffusers would show the latents themselves
    assert objective.companions == ("autoencoder",)


def latent_file(path: Path, latents: Latents | None) -> Rows:
    table = pa.table({"latent": torch.randn(20, 2, 2, 2).tolist(), "label": [i % 2 for i in range(20)]})
    notes = {METADATA: latents.model_dump_json()} if latents else None
    pq.write_table(table.replace_schema_metadata(notes), path)
    return open_rows([SourceSpec(path=str(path))])


def teacher(folder: Path, latents: Latents | None, space: Any = "latent") -> Path:
    reading = Reading(path=Cosine(), prediction="v", data_std=1.0)
    Signature(reading=reading, space=space, shape=(2, 2, 2), latents=latents).save(folder)
    return folder


def test_whose_latents_they_are_is_kept_and_others_are_refused(folder: Path, tmp_path: Path) -> None:
    own = network(folder).latents("mine")
    plain = latent_file(tmp_path / "plain.parquet", None)
    mine, other = (latent_file(tmp_path / f"{k.name}.parquet", k) for k in (own, OTHER))
    objective = unprepared(diffusion, {})
    prepared(objective, mine, plain)
    assert objective.signature.latents == own
    assert objective.ahead() is None
    objective = unprepared(diffusion, frozen(folder))  # data and the network at hand
    prepared(objective, mine, None)
    with pytest.raises(UserError, match=r"autoencoder makes latents of .* `.*vae`.*another.parquet` holds"):
        prepared(unprepared(diffusion, frozen(folder)), other, None)
    with pytest.raises(UserError, match=r"mine.parquet` holds .*another.parquet` holds those of `another` \(0123"):
        prepared(unprepared(diffusion, {}), mine, other)
    said = tmp_path / "teacher"
    said.mkdir()
    for rows, networks in ((mine, {}), (pictures(), frozen(folder)), (plain, {})):
        objective = unprepared(consistency, {"teacher": ELSEWHERE, **networks})
        objective.restore({"teacher": teacher(said, OTHER)})
        if rows is plain:  # it does not say
            prepared(objective, rows, None)
            assert objective.signature.latents == OTHER
            continue
        with pytest.raises(UserError, match=r"networks.teacher denoises latents of .* `another` \(0123"):
            prepared(objective, rows, None)


def test_pictures_are_not_latents(folder: Path, tmp_path: Path) -> None:
    objective = unprepared(consistency, {"teacher": ELSEWHERE})
    objective.restore({"teacher": teacher(tmp_path, OTHER)})
    with pytest.raises(UserError, match=r"networks\.autoencoder is missing"):
        prepared(objective, pictures(), None)
    objective = unprepared(consistency, {"teacher": ELSEWHERE, **frozen(folder)})
    objective.restore({"teacher": teacher(tmp_path, None, "image")})
    with pytest.raises(UserError, match="denoises pictures"):
        prepared(objective, pictures(), None)
    with pytest.raises(UserError, match=r"objective\.augment"):
        denoising(folder, augment={"flip": True})
    with pytest.raises(UserError, match=r"must have `frozen: true`, and `from` or `path`"):
        unprepared(diffusion, {"autoencoder": {"type": "autoencoder_kl"}})


def test_reflow_encodes_held_out_pictures_beside_its_pairs(folder: Path, tmp_path: Path) -> None:
    said = tmp_path / "teacher"
    said.mkdir()
    teacher(said, network(folder).latents("mine"))
    networks = {"teacher": {"path": str(said), "frozen": True}, **frozen(folder)}
    objective = unprepared(reflow, networks, teacher_steps=1, one_step=True)
    data = prepared(objective, pictures(), pictures(20))
    worked(objective, {"teacher": lambda z, t: 0 * z, "autoencoder": network(folder)})
    assert data.eval is not None
    assert whole(data.train).keys() == whole(data.eval).keys() == {"latent", "label", "noise", "made"}
    assert whole(data.eval)["latent"].shape == (20, 2, 2, 2)
