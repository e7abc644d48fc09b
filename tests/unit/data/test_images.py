"""Pictures as PIL reads them; sizes, channels, labels and augmentation; every fault is told by row."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from scaletrain.config import SourceSpec
from scaletrain.data import images
from scaletrain.data.classes import Classes
from scaletrain.data.images import Augment, ImageDataset, ImageOptions
from scaletrain.data.loader import Layout, Micro, Windows
from scaletrain.data.sources import Rows, open_rows
from scaletrain.data.tables import ArrayTable
from scaletrain.errors import UserError

RNG = np.random.default_rng(0)


def encoded(array: np.ndarray, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, kind)
    return stream.getvalue()


def parquet(path: Path, values: list[Any], labels: list[Any] | None = None) -> Rows:
    pq.write_table(pa.table({"image": values, "label": labels or [0] * len(values)}), path)
    return open_rows([SourceSpec(path=str(path))])


def arrays(count: int = 5, shape: tuple[int, ...] = (6, 4)) -> np.ndarray:
    return RNG.integers(0, 256, (count, *shape), np.uint8)


def labelled(labels: list[Any]) -> Rows:
    return Rows([ArrayTable("set", {"image": arrays(len(labels)), "label": np.array(labels, object)})])


def seeds(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.uint64)


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3)])
def test_pixels_are_those_that_were_written(tmp_path: Path, shape: tuple[int, ...]) -> None:
    original = arrays(5, shape)
    expected = (original if len(shape) == 3 else original[..., None]).transpose(0, 3, 1, 2)
    (tmp_path / "pictures").mkdir()
    for i, picture in enumerate(original):
        (tmp_path / f"pictures/{i}.png").write_bytes(encoded(picture))
    listed = "".join(json.dumps({"image": f"pictures/{i}.png"}) + "\n" for i in range(5))
    (tmp_path / "list.jsonl").write_text(listed)  # paths are relative to the file that lists them
    pngs = [encoded(p) for p in original]
    forms = [
        parquet(tmp_path / "bytes.parquet", pngs),
        parquet(tmp_path / "struct.parquet", [{"bytes": png, "path": None} for png in pngs]),
        parquet(tmp_path / "lists.parquet", original.tolist()),
        open_rows([SourceSpec(path=str(tmp_path / "pictures"))]),
        open_rows([SourceSpec(path=str(tmp_path / "list.jsonl"))]),
        Rows([ArrayTable("floats", {"image": original / 255})]),
    ]
    for rows in forms:
        dataset = ImageDataset(rows)
        assert dataset.shape == expected.shape[1:]
        batch = dataset.batch([3, 0], seeds(2))
        assert set(batch) == {"image"}
        assert batch["image"].dtype == torch.float32
        np.testing.assert_allclose(batch["image"].numpy(), expected[[3, 0]] / 127.5 - 1, atol=1e-6)


def test_one_at_a_time_is_the_same_as_at_once_and_as_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = parquet(tmp_path / "a.parquet", [encoded(p) for p in arrays()], [0, 1, 2, 1, 0])
    classes = Classes.find(rows, "label")
    kept = ImageDataset(rows, classes=classes)
    monkeypatch.setattr(images, "IN_MEMORY_BYTES", 0)
    lazy = ImageDataset(rows, classes=classes)
    assert (kept.decodes, lazy.decodes) == (False, True)
    for batch in (lazy.batch([4, 1], seeds(2)), kept.collate([kept.example(i, RNG) for i in (4, 1)])):
        for name, tensor in kept.batch([4, 1], seeds(2)).items():
            assert torch.equal(tensor, batch[name])
    assert kept.batch([4, 1], seeds(2))["label"].tolist() == [0, 1]


def test_size_covers_and_cuts_at_the_centre() -> None:
    wide = np.zeros((1, 8, 16), np.uint8)
    wide[:, :, 4:12] = 255  # what remains of it as a square
    dataset = ImageDataset(Rows([ArrayTable("set", {"image": wide})]), size=4)
    assert dataset.shape == (1, 4, 4)
    assert dataset.pixels(0).min() > 200
    assert ImageDataset(Rows([ArrayTable("set", {"image": wide})]), size=(4, 8)).pixels(0)[0, 0, 0] < 50


def test_orientation_of_the_camera_is_undone(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the top is on the right
    Image.fromarray(arrays(1)[0]).save(tmp_path / "a.jpg", exif=exif)
    assert ImageDataset(open_rows([SourceSpec(path=str(tmp_path))])).shape == (1, 4, 6)


def test_channels(tmp_path: Path) -> None:
    grey, colour = arrays(1)[0], arrays(1, (6, 4, 3))[0]
    mixed = parquet(tmp_path / "a.parquet", [encoded(colour), encoded(grey)])
    np.testing.assert_array_equal(ImageDataset(mixed).pixels(1), np.stack([grey] * 3))
    with pytest.raises(UserError, match=r"row 1 .*`channels`"):
        ImageDataset(parquet(tmp_path / "b.parquet", [encoded(grey), encoded(colour)]))
    luma = np.array(Image.fromarray(colour).convert("L"))
    np.testing.assert_array_equal(ImageDataset(mixed, channels=1).pixels(0)[0], luma)


@pytest.mark.parametrize("lazy", [False, True])
def test_a_corrupt_picture_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lazy: bool) -> None:
    if lazy:
        monkeypatch.setattr(images, "IN_MEMORY_BYTES", 0)
    good = [encoded(p) for p in arrays(600)]
    for bad in (good[0][:50], b"no picture", b"", None):
        rows = parquet(tmp_path / "a.parquet", [*good[:400], bad, *good[401:598], bad])
        with pytest.raises(UserError, match=r"a\.parquet row 400: the picture cannot be decoded"):
            ImageDataset(rows).pixels(400)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((1, 4, 4), 256), "0 to 255"),
        (np.full((1, 4, 4), -0.1), "floats from 0 to 1"),
        (np.full((1, 4, 4), np.nan), "floats from 0 to 1"),
        (np.zeros((1, 16), np.uint8), r"shape \(16,\)"),
        (np.zeros((1, 4, 4, 2), np.uint8), r"shape \(4, 4, 2\)"),
    ],
)
def test_arrays_that_are_no_pictures_are_refused(array: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=f"set row 0.*{message}"):
        ImageDataset(Rows([ArrayTable("set", {"image": array})]))


def test_sixteen_bits_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png.*8 bits"):
        ImageDataset(open_rows([SourceSpec(path=str(tmp_path))]))


def test_another_size_is_named(tmp_path: Path) -> None:
    rows = parquet(tmp_path / "a.parquet", [encoded(arrays(1)[0]), encoded(arrays(1, (5, 4))[0])])
    with pytest.raises(UserError, match=r"row 1 .*`size`"):
        ImageDataset(rows)
    with pytest.raises(UserError, match=r"objective\.size"):
        ImageOptions().pictures(rows.select([1]), False, ImageOptions().shape(rows.select([0])))
    four = ImageOptions(size=4)
    assert four.pictures(rows.select([1]), False, four.shape(rows.select([0]))).shape == (1, 4, 4)


def test_classes_by_number() -> None:
    rows = labelled([2, 0, 2])
    assert Classes.find(rows, "label") == Classes(("0", "1", "2"), named=False)
    assert len(Classes.find(rows, "label", 5)) == 5
    assert Classes.find(rows, "label").encode(rows, "label").tolist() == [2, 0, 2]
    with pytest.raises(UserError, match=r"set row 0: `label` is 2, out of range"):
        Classes.find(rows, "label", 2)
    with pytest.raises(UserError, match=r"set row 1: `label` is 3, out of range: there are 3 classes, 0 to 2"):
        Classes.find(rows, "label").encode(labelled([0, 3]), "label")


def test_classes_by_name() -> None:
    rows = labelled(["dog", "cat", "dog"])
    classes = Classes.find(rows, "label")
    assert classes == Classes(("cat", "dog"), named=True)
    assert classes.encode(rows, "label").tolist() == [1, 0, 1]
    assert Classes.find(labelled(["10", "9"]), "label").names == ("9", "10")
    with pytest.raises(UserError, match=r"set row 1.*'dgo'.*Did you mean `dog`"):
        classes.encode(labelled(["cat", "dgo"]), "label")
    with pytest.raises(UserError, match=r"set row 2.*'c'"):
        Classes.find(labelled(["b", "a", "c"]), "label", 2)


@pytest.mark.parametrize("label", [None, -1, 1.5, True, "name"])
def test_what_is_no_class_is_named(label: object) -> None:
    with pytest.raises(UserError, match="set row 1"):
        Classes.find(labelled([0, label]), "label")


def test_crop_shows_a_window_of_the_bordered_picture() -> None:
    image = RNG.integers(1, 256, (3, 6, 5), np.uint8)
    bordered = np.pad(image, ((0, 0), (2, 2), (2, 2)))
    windows = {bordered[:, y : y + 6, x : x + 5].tobytes() for y in range(5) for x in range(5)}
    seen = {Augment(crop=2).apply(image, RNG).tobytes() for _ in range(1000)}
    assert seen == windows


def test_flip_is_a_mirror_half_of_the_time() -> None:
    image = arrays(1)
    flipped = [np.array_equal(Augment(flip=True).apply(image, RNG), image[:, :, ::-1]) for _ in range(1000)]
    kept = [np.array_equal(Augment(flip=True).apply(image, RNG), image) for _ in range(1000)]
    assert np.mean(flipped) == pytest.approx(0.5, abs=0.06)
    assert np.mean(kept) == pytest.approx(0.5, abs=0.06)


def test_erase_greys_a_square_and_leaves_the_data_alone() -> None:
    image = np.zeros((1, 9, 9), np.uint8)
    areas = [int((Augment(erase=4).apply(image, RNG) == 128).sum()) for _ in range(300)]
    assert max(areas) == 16
    assert min(areas) == 4  # at a corner
    assert not image.any()


def test_augmentation_follows_the_seed_of_each_example() -> None:
    dataset = ImageDataset(
        Rows([ArrayTable("set", {"image": arrays(50)})]), augment=Augment(crop=1, flip=True, erase=2, noise=0.5)
    )
    assert dataset.decodes
    whole = dataset.batch(range(50), seeds(50))["image"]
    assert torch.equal(dataset.batch([7, 30], seeds(50)[[7, 30]])["image"], whole[[7, 30]])
    assert not torch.equal(dataset.batch(range(50), seeds(50) + np.uint64(50))["image"], whole)


def test_noise_has_its_standard_deviation() -> None:
    rows = Rows([ArrayTable("set", {"image": np.full((100, 16, 16), 128, np.uint8)})])
    noisy = ImageDataset(rows, augment=Augment(noise=0.2)).batch(range(100), seeds(100))["image"]
    assert noisy.std().item() == pytest.approx(0.2, rel=0.03)
    assert noisy.mean().item() == pytest.approx(128 / 127.5 - 1, abs=0.01)


@pytest.mark.parametrize("names", [["a", "b"], [0, 1]])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_gives_the_batches_of_the_same_rows_in_memory(tmp_path: Path, names: list[Any], workers: int) -> None:
    pixels, labels = arrays(60), [names[i % 2] for i in range(60)]
    table = pa.table({"image": [encoded(p) for p in pixels], "label": labels})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    kept, streamed = (open_rows([SourceSpec(path=str(tmp_path / "a.parquet"), stream=s)]) for s in (False, True))
    augment = Augment(crop=1, flip=True, noise=0.1)
    count = 2 if isinstance(names[0], int) else None
    sets = [ImageDataset(r, augment=augment, classes=Classes.find(r, "label", count)) for r in (kept, streamed)]
    for index in (0, 59):
        here, there = (s.batch([index, 3], seeds(2)) for s in sets)
        assert all(torch.equal(here[k], there[k]) for k in ("image", "label"))
    loader = Windows(sets[1], Layout(8, 4), (0,), workers=workers, shuffle=20)
    seen = []
    for _ in range(7):
        for micro in next(loader):
            assert isinstance(micro, Micro)
            seen += micro.examples
            assert micro.tensors["label"].tolist() == [i % 2 for i in micro.examples]
    assert len(set(seen)) == 56
    assert sets[1].example(5, np.random.default_rng(0))["label"] == 1


def test_a_label_of_a_stream_is_checked_as_it_is_read(tmp_path: Path) -> None:
    table = pa.table({"image": [encoded(p) for p in arrays(9)], "label": [0] * 8 + [7]})
    pq.write_table(table, tmp_path / "a.parquet")
    rows = open_rows([SourceSpec(path=str(tmp_path / "a.parquet"), stream=True)])
    found = ImageDataset(rows, classes=Classes.find(rows, "label", 3))
    with pytest.raises(UserError, match=r"row 8: `label` is 7, out of range"):
        found.batch([8], seeds(1))
