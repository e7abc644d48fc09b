import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from scaletrain.checkpoint import integrity, reader, writer
from scaletrain.checkpoint.layout import checkpoints
from scaletrain.checkpoint.writer import prune, set_aside, write
from scaletrain.errors import UserError

WEIGHTS = "networks/model/model.safetensors"


def fill(folder: Path) -> None:
    (folder / "training").mkdir()
    (folder / "training" / "state.json").write_text("{}")
    (folder / "networks" / "model").mkdir(parents=True)
    save_file({"w": torch.arange(600.0)}, folder / WEIGHTS)


def save(root: Path, step: int, **facts: Any) -> Path:
    return write(root, step, fill, {"stage": "main", "complete": False, **facts})


def steps(root: Path) -> list[int]:
    return [int(p.name.removeprefix("step-")) for p in checkpoints(root)]


def test_a_whole_checkpoint_verifies_and_latest_points_to_it(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    assert integrity.verify(path) == []
    assert reader.newest(tmp_path) == path
    assert (tmp_path / "latest").resolve() == path.resolve()
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("name", [WEIGHTS, "training/state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damage_is_named_and_the_one_before_is_taken(tmp_path: Path, name: str, damage: str) -> None:
    before, path = save(tmp_path, 1), save(tmp_path, 2)
    file = path / name
    if damage == "flip":
        content = bytearray(file.read_bytes())
        content[0] ^= 1
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
    faults = integrity.verify(path)
    if name == "manifest.json" and damage == "truncate":  # its last byte is a line feed
        assert faults == []
        return
    assert len(faults) == 1
    assert faults[0].startswith(name)
    assert reader.newest(tmp_path) == before


def test_a_file_that_the_manifest_does_not_know_is_a_fault(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / "extra.json").write_text("{}")
    assert integrity.verify(path) == ["extra.json: not in the manifest"]
    with pytest.raises(UserError, match=r"No checkpoint.*extra\.json"):
        reader.newest(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "training/model/.metadata", "training/model/__0_0.distcp", "networks/model/pytorch_model.bin", "training/x.pt",
        "networks/model/tokenizer.json", "networks/model/other.safetensors", "training/notes",
    ],
)  # fmt: skip
@pytest.mark.parametrize("archive", [False, True])
def test_a_pickle_is_refused_though_the_manifest_lists_it(tmp_path: Path, name: str, archive: bool) -> None:
    before, path = save(tmp_path, 1), save(tmp_path, 2)
    file = path / name
    file.parent.mkdir(exist_ok=True)
    if archive:
        with file.open("wb") as stream:
            torch.save({"w": torch.zeros(3)}, stream)
    else:
        file.write_bytes(pickle.dumps({"w": [1.0] * 30}))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": file.stat().st_size, "sha256": integrity.sha256(file)}
    (path / "manifest.json").write_text(json.dumps(integrity.sealed(manifest)))  # whoever can list it can seal it
    faults = integrity.verify(path)
    assert len(faults) == 1
    assert faults[0].startswith(f"{name}: a pickle")
    assert reader.newest(tmp_path) == before


def test_no_byte_of_the_manifest_can_change_unseen(tmp_path: Path) -> None:
    before, path = save(tmp_path, 1), save(tmp_path, 2)
    file = path / "manifest.json"
    content = file.read_bytes()
    meant = json.loads(content)
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1
        file.write_bytes(changed)
        faults = integrity.verify(path)
        if not faults:  # a space that JSON does not mind
            assert json.loads(changed) == meant
        else:
            assert faults[0].startswith("manifest.json: ")
    for odd in ("[]", '{"files": []}', '{"files": {"a": {}}}', "null"):
        file.write_text(odd)
        assert integrity.verify(path)[0].startswith("manifest.json: cannot be read")
    assert reader.newest(tmp_path) == before
    prune(tmp_path, 1, before)
    file.write_text('{"format": 1, "files": {}}')
    with pytest.raises(UserError, match="format 1"):
        reader.manifest(path)


def test_a_file_that_the_disk_does_not_give_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, path = save(tmp_path, 1), save(tmp_path, 2)
    whole = integrity.sha256

    def bad_sector(file: Path) -> str:
        if file == path / WEIGHTS:
            raise OSError(5, "Input/output error")
        return whole(file)

    monkeypatch.setattr(integrity, "sha256", bad_sector)
    assert integrity.verify(path) == [f"{WEIGHTS}: cannot be read (Input/output error)"]
    assert reader.newest(tmp_path) == before


def test_a_link_is_a_fault(tmp_path: Path) -> None:
    path = save(tmp_path / "run", 1)
    (path / "networks" / "model").rename(tmp_path / "elsewhere")
    (path / "networks" / "model").symlink_to(tmp_path / "elsewhere")
    assert integrity.verify(path) == ["networks/model: a link, and no file of this checkpoint"]


def test_what_is_half_removed_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it removes an old checkpoint, and while it replaces one of the same step."""
    for step in (1, 2):
        save(tmp_path, step, best=step == 2)
    remove = shutil.rmtree

    def killed(path: Path, **options: Any) -> None:
        if Path(path).exists():
            (path / WEIGHTS).unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(tmp_path, 1, tmp_path / "step-00000002")
    assert [integrity.verify(path) for path in checkpoints(tmp_path)] == [[]]
    assert (tmp_path / "best").resolve() == checkpoints(tmp_path)[0]
    monkeypatch.setattr(shutil, "rmtree", remove)
    save(tmp_path, 2, again=True)
    prune(tmp_path, 1, tmp_path / "step-00000002")
    assert reader.manifest(tmp_path / "step-00000002")["again"]
    assert not list(tmp_path.glob(".saving-old-step-00000002"))


def test_an_old_one_that_will_not_go_and_links_that_cannot_be_made_fail_no_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    save(tmp_path, 1)
    monkeypatch.setattr(os, "symlink", refuse)
    written = save(tmp_path, 2)
    assert f"latest could not be made to point to {written.name}" in caplog.text
    monkeypatch.setattr(Path, "rename", refuse)
    prune(tmp_path, 1, written)
    assert "step-00000001 could not be removed" in caplog.text
    assert steps(tmp_path) == [1, 2]


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    before = save(tmp_path, 1)

    def full(folder: Path) -> None:
        fill(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write(tmp_path, 2, full, {"stage": "main", "complete": False})
    assert reader.newest(tmp_path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000001"]


def test_a_disk_that_does_not_give_back_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = save(tmp_path, 1)
    flush = writer._flush

    def lose(path: Path) -> None:
        flush(path)
        if path.suffix == ".safetensors":
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)

    monkeypatch.setattr(writer, "_flush", lose)
    with pytest.raises(OSError, match=f"does not read back: {WEIGHTS}"):
        save(tmp_path, 2)
    assert checkpoints(tmp_path) == [before]
    assert (tmp_path / "latest").resolve() == before.resolve()


def test_retention_keeps_the_newest_the_best_the_milestones_and_the_ends_of_stages(tmp_path: Path) -> None:
    for step in range(1, 9):
        save(tmp_path, step, complete=step == 3, best=step in (1, 2), kept=step == 4)
    prune(tmp_path, 2, tmp_path / "step-00000008")
    assert steps(tmp_path) == [2, 3, 4, 7, 8]
    assert (tmp_path / "best").resolve().name == "step-00000002"
    assert reader.stage_end(tmp_path, "main") == tmp_path / "step-00000003"


def test_what_is_in_use_is_removed_later(tmp_path: Path) -> None:
    for step in range(1, 4):
        save(tmp_path, step)
    prune(tmp_path, 1, tmp_path / "step-00000003", {"step-00000001"})
    assert steps(tmp_path) == [1, 3]
    prune(tmp_path, 1, tmp_path / "step-00000003")
    assert steps(tmp_path) == [3]


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    content = json.loads((path / "manifest.json").read_text()) | {"format": 99}
    (path / "manifest.json").write_text(json.dumps(integrity.sealed(content)))
    assert reader.newest(tmp_path) == path
    with pytest.raises(UserError, match="format 99"):
        reader.manifest(path)


def test_damaged_folders_do_not_push_out_good_ones(tmp_path: Path) -> None:
    """A run that goes on from step 50 because 100 is damaged keeps what it writes at 60."""
    good, damaged = save(tmp_path, 50), save(tmp_path, 100)
    (damaged / WEIGHTS).write_bytes(b"")
    assert reader.newest(tmp_path) == good
    set_aside(tmp_path, good)
    assert (tmp_path / "latest").resolve() == good.resolve()
    assert (tmp_path / "damaged-step-00000100").is_dir()
    written = save(tmp_path, 60)
    prune(tmp_path, 1, written)
    assert checkpoints(tmp_path) == [written]


def test_the_end_of_a_stage_is_verified_before_it_is_used(tmp_path: Path) -> None:
    end = save(tmp_path, 3, complete=True)
    save(tmp_path, 4)
    (end / WEIGHTS).write_bytes(b"short")
    with pytest.raises(UserError, match=r"stage `main` ended, is damaged: networks/model/model\.safetensors"):
        reader.stage_end(tmp_path, "main")


def test_what_was_just_written_is_never_removed(tmp_path: Path) -> None:
    written = save(tmp_path, 60)
    save(tmp_path, 100)
    prune(tmp_path, 1, written)
    assert written in checkpoints(tmp_path)
