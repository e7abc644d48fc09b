"""Data sets that are encoded once: what is in the files, what a killed one leaves, and how it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.datasets import load_digits

from scaletrain import encode as encoding
from scaletrain.config import NetworkSpec, SourceSpec
from scaletrain.data.points import arrays
from scaletrain.data.sources import open_rows
from scaletrain.encode import Options, encode
from scaletrain.errors import UserError
from scaletrain.networks._latents import METADATA
from scaletrain.networks.build import build, save

pytest.importorskip("diffusers")

DIGITS = SourceSpec(path="sklearn:digits", rows=100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder's."""
    found = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    config = {"channels": 1, "features": [8, 8], "groups": 4, "latent_channels": 2}
    spec = NetworkSpec(type="autoencoder_kl", config=config)
    module = build("autoencoder", spec)
    module.statistics.running_var.fill_(4.0)  # type: ignore[union-attr, operator]
    save(module, spec, found)
    return found


def network(folder: Path) -> Any:
    return build("autoencoder", NetworkSpec(type="autoencoder_kl", path=str(folder), frozen=True)).eval()


def latents(path: Path) -> torch.Tensor:
    return arrays(open_rows([SourceSpec(path=str(path))]), ["latent"]).tensors["latent"]


def test_what_is_read_back_is_what_the_network_makes(folder: Path, tmp_path: Path) -> None:
    module = network(folder)
    images = torch.from_numpy(np.rint(load_digits().images[:100] * (255 / 16))).float()[:, None] / 127.5 - 1
    with torch.no_grad():
        expected = module(images, "encode")
    for out, options in (
        (tmp_path / "parts", Options(rows=40, batch=16)),
        (tmp_path / "whole.parquet", Options(batch=7)),
        (tmp_path / "half.parquet", Options(dtype="float16")),
    ):
        assert encode(str(folder), None, DIGITS, out, options) == 100
        tolerance = 1e-3 if options.dtype == "float16" else 1e-5
        torch.testing.assert_close(latents(out), expected, rtol=tolerance, atol=tolerance)
        with torch.no_grad():
            made = module(latents(out), "decode")
            torch.testing.assert_close(made, module(expected, "decode"), rtol=0, atol=10 * tolerance)
        rows = open_rows([SourceSpec(path=str(out))])
        assert list(rows.column("label")) == load_digits().target[:100].tolist()
        assert set(rows.columns) == {"label", "latent"}
        notes = [json.loads(note) for note in rows.notes(METADATA).values()]
        assert {note["autoencoder"] for note in notes} == {module.latents("").autoencoder}
        assert notes[0]["scaling_factor"] == pytest.approx(0.5)
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == [
        f"part-0000{i}-of-00003.parquet" for i in range(3)
    ]


class Killed(Exception):
    pass


def test_a_killed_one_leaves_nothing_by_that_name_and_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    plain = encoding._Pictures.make

    def limited(limit: int) -> Any:
        def make(self: Any, read: torch.Tensor) -> Any:
            if len(made) == limit:
                raise Killed
            made.append(len(read))
            return plain(self, read)

        return make

    for out, options, begun in (
        (tmp_path / "a", Options(rows=30, batch=10), 6),  # the third file is half written
        (tmp_path / "a.parquet", Options(batch=10), 0),  # one file is begun anew
    ):
        made.clear()
        monkeypatch.setattr(encoding._Pictures, "make", limited(8))
        with pytest.raises(Killed):
            encode(str(folder), None, DIGITS, out, options)
        assert not out.exists()
        assert all(p.name.startswith(".") for p in tmp_path.iterdir() if p.name.endswith(".partial"))
        monkeypatch.setattr(encoding._Pictures, "make", limited(100))
        made.clear()
        encode(str(folder), None, DIGITS, out, options)
        assert len(made) == 10 - begun
        monkeypatch.undo()
        encode(str(folder), None, DIGITS, tmp_path / f"whole-{out.name}", options)
        assert torch.equal(latents(out), latents(tmp_path / f"whole-{out.name}"))
        assert not list(tmp_path.glob(".*"))
        if out.is_dir():
            assert {p.suffix for p in out.iterdir()} == {".parquet"}


def test_other_options_do_not_go_on_with_what_is_left(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, calls = tmp_path / "a", []
    plain = encoding._Pictures.make

    def make(self: Any, read: torch.Tensor) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise Killed
        return plain(self, read)

    monkeypatch.setattr(encoding._Pictures, "make", make)
    with pytest.raises(Killed):
        encode(str(folder), None, DIGITS, out, Options(rows=30, batch=10))
    encode(str(folder), None, DIGITS, out, Options(rows=30, batch=10, size=16))
    with pytest.raises(UserError, match="--rows is for a folder of files"):
        encode(str(folder), None, DIGITS, out.with_name("one.parquet"), Options(rows=30))
    assert len(calls) == 5 + 10
    assert latents(out).shape == (100, 2, 8, 8)


def test_what_cannot_be_is_told(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="is there already"):
        encode(str(folder), None, DIGITS, tmp_path / "there", Options())
    with pytest.raises(UserError, match="no column `image`"):
        encode(str(folder), None, SourceSpec(path="sklearn:iris"), tmp_path / "out", Options())
    with pytest.raises(UserError, match="is no pipeline"):
        encode(str(folder), None, DIGITS, tmp_path / "out", Options(text="label"))
    assert not list(tmp_path.glob("*out*"))


def test_texts_are_encoded_by_a_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scaletrain.diffusion.pipelines import Pipeline
    from tests.unit.diffusers_pipelines import TOKENS, saved

    pipe = tmp_path / "pipe"
    saved("dit", pipe)
    monkeypatch.setattr(
        Pipeline,
        "encoder",
        lambda self, device: lambda texts: {"prompt_embeds": torch.tensor([[[len(t)] * 3] * TOKENS for t in texts])},
    )
    lines = [{"image": np.full((16, 16), i * 9).tolist(), "caption": "x" * i} for i in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data, out = SourceSpec(path=str(tmp_path / "rows.jsonl")), tmp_path / "out.parquet"
    encode(str(pipe), None, data, out, Options(text="caption", batch=2))
    table = pq.read_table(out)
    assert table.column_names == ["caption", "latent", "prompt_embeds"]
    assert [value[0][0] for value in table["prompt_embeds"].to_pylist()] == [0, 1, 2, 3, 4]
    assert np.shape(table["latent"].to_pylist()) == (5, 4, 8, 8)
