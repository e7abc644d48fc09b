"""What is kept beside a denoiser's weights comes back as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scaletrain.diffusion.reading import Reading
from scaletrain.diffusion.signature import FILE, Signature
from scaletrain.errors import UserError
from scaletrain.networks.mixture import Config as MixtureConfig
from tests.unit.diffusion.closed_forms import PATHS


@pytest.mark.parametrize("name", PATHS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    plain = Signature(reading=Reading(path=PATHS[name], prediction="eps"), space="image", shape=(3, 8, 8))
    full = Signature(
        reading=Reading(path=PATHS[name], prediction="edm", data_std=0.5),
        space="point",
        shape=(16,),
        condition="label",
        classes=8,
        dropped=True,
        guidance=(1.0, 8.0),
        source=MixtureConfig(modes="random", dim=16),
    )
    for signature in (plain, full):
        signature.save(tmp_path)
        assert Signature.load(tmp_path) == signature


def test_none_where_there_is_none_and_a_key_that_nobody_knows_is_told(tmp_path: Path) -> None:
    assert Signature.load(tmp_path) is None
    Signature(reading=Reading(), space="image", shape=(1, 8, 8)).save(tmp_path)
    written = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps({**written, "temperature": 1}))
    with pytest.raises(UserError, match="temperature"):
        Signature.load(tmp_path)
