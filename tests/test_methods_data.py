"""Image sets: what is read right, and what is refused in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from methods.common import sources
from methods.common.config import RunConfig
from methods.common.data import ImageData, choose_labelled
from methods.common.errors import UserError
from methods.common.images import find_images, read_image


def load(spec: str, seed: int = 0, **settings) -> ImageData:
    return sources.load(RunConfig(data=spec, seed=seed, **settings))


def arrays(n: int = 12, shape: tuple[int, ...] = (6, 5), classes: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (n, *shape), dtype=np.uint8),
        "y_train": np.arange(n) % classes,
        "x_test": rng.integers(0, 256, (4, *shape), dtype=np.uint8),
        "y_test": np.arange(4) % classes,
    }


def save(folder: Path, **replaced: np.ndarray) -> str:
    path = folder / "set.npz"
    np.savez(path, **(arrays() | replaced))
    return f"npz:{path}"


def test_digits_are_whole_stratified_and_split_by_seed() -> None:
    data = load("digits", 0)
    assert data.x_train.shape == (1437, 1, 8, 8)
    assert data.x_test.shape == (360, 1, 8, 8)
    assert data.x_train.dtype == torch.uint8
    assert int(data.x_train.max()) == 255
    assert data.class_names == tuple("0123456789")
    assert torch.bincount(data.y_test).tolist() == pytest.approx([36] * 10, abs=1)
    assert load("digits", 0).fingerprint() == data.fingerprint() != load("digits", 1).fingerprint()


def test_npz_grey_and_colour_keep_every_pixel_in_place(tmp_path: Path) -> None:
    given = arrays()
    data = load(save(tmp_path), 0)
    assert data.x_train.shape == (12, 1, 6, 5)
    assert torch.equal(data.x_train[:, 0], torch.from_numpy(given["x_train"]))
    given = arrays(shape=(6, 5, 3))
    np.savez(tmp_path / "colour.npz", **given)
    data = load(f"npz:{tmp_path}/colour.npz", 0)
    assert data.image_size == (6, 5)
    assert torch.equal(data.x_test.permute(0, 2, 3, 1), torch.from_numpy(given["x_test"]))


def test_npz_classes_are_numbered_in_order_and_minus_one_means_unknown(tmp_path: Path) -> None:
    y_train = np.array([30, 10, -1, 20] * 3)
    data = load(save(tmp_path, y_train=y_train, y_test=np.array([10, 20, 30, 30])), 0)
    assert data.class_names == ("10", "20", "30")
    assert data.y_train.tolist() == [2, 0, -1, 1] * 3
    assert data.y_test.tolist() == [0, 1, 2, 2]


def test_pixel_statistics_are_those_of_the_floats(tmp_path: Path) -> None:
    np.savez(tmp_path / "colour.npz", **arrays(shape=(6, 5, 3)))
    data = load(f"npz:{tmp_path}/colour.npz", 0)
    mean, deviation = data.pixel_statistics()
    pixels = data.x_train.double() / 255
    torch.testing.assert_close(mean.double(), pixels.mean(dim=(0, 2, 3)), atol=1e-6, rtol=0)
    torch.testing.assert_close(deviation.double(), pixels.std(dim=(0, 2, 3), unbiased=False), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"x_train": np.zeros((12, 6, 5), np.float32)}, "x_train must be uint8, is float32"),
        ({"x_train": np.zeros((12, 30), np.uint8)}, r"x_train must be \(N, H, W\) or \(N, H, W, 3\), is \(12, 30\)"),
        ({"x_train": np.zeros((12, 6, 5, 4), np.uint8)}, "x_train must be"),
        ({"x_test": np.zeros((4, 6, 6), np.uint8)}, "differ in shape"),
        ({"x_train": np.zeros((0, 6, 5), np.uint8), "y_train": np.zeros(0, int)}, "x_train holds no image"),
        ({"x_train": np.zeros((12, 3, 3), np.uint8)}, "4 x 4 is the least"),
        ({"y_train": np.arange(11)}, r"y_train must be \(12,\)"),
        ({"y_train": np.linspace(0, 1, 12)}, "y_train must hold integers"),
        ({"y_train": np.zeros(12, int), "y_test": np.zeros(4, int)}, "names 1 classes"),
        ({"y_test": np.array([0, 1, 2, 7])}, "y_test holds class 7"),
    ],
)
def test_npz_of_wrong_contents(tmp_path: Path, replaced: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(save(tmp_path, **replaced), 0)


def test_npz_that_cannot_be_read(tmp_path: Path) -> None:
    whole = Path(save(tmp_path).removeprefix("npz:")).read_bytes()
    for content in (b"", b"no archive", whole[: len(whole) // 2], whole[:200] + b"\xff" * 60 + whole[260:]):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(UserError, match=r"bad\.npz"):
            load(f"npz:{tmp_path}/bad.npz", 0)
    with pytest.raises(UserError, match="No such file"):
        load(f"npz:{tmp_path}/none.npz", 0)
    with pytest.raises(UserError, match="directory"):
        load(f"npz:{tmp_path}", 0)
    np.savez(tmp_path / "objects.npz", **(arrays() | {"x_train": np.array([{}, "a"], dtype=object)}))
    with pytest.raises(UserError, match="plain arrays"):
        load(f"npz:{tmp_path}/objects.npz", 0)
    np.savez(tmp_path / "short.npz", x_train=arrays()["x_train"])
    with pytest.raises(UserError, match="lacks the arrays y_train"):
        load(f"npz:{tmp_path}/short.npz", 0)
    with pytest.raises(UserError, match="--data imagenet is unknown"):
        load("imagenet", 0)


def test_labels_are_spread_over_the_classes() -> None:
    classes = torch.arange(60) % 4
    classes[::7] = -1
    chosen = choose_labelled(classes, 14, 4, seed=0)
    counts = torch.bincount(classes[chosen], minlength=4)
    assert sorted(counts.tolist()) == [3, 3, 4, 4]
    assert chosen.unique().equal(chosen)
    assert torch.equal(chosen, choose_labelled(classes, 14, 4, seed=0))
    assert not torch.equal(chosen, choose_labelled(classes, 14, 4, seed=1))
    assert torch.equal(choose_labelled(classes, 0, 4, seed=0), torch.nonzero(classes >= 0).flatten())


@pytest.mark.parametrize(
    ("n_labels", "message"), [(3, "fewer than one for each"), (99, "more than the"), (-1, "fewer"), (20, "class 0")]
)
def test_labels_that_cannot_be_had(n_labels: int, message: str) -> None:
    classes = torch.tensor([0, 1, 1, 1, 2, 2, 2, 2, 3, 3] * 3)
    with pytest.raises(UserError, match=message):
        choose_labelled(classes, n_labels, 4, seed=0)


def test_npz_without_a_test_part_or_its_classes(tmp_path: Path) -> None:
    given = arrays()
    np.savez(tmp_path / "a.npz", x_train=given["x_train"], y_train=given["y_train"])
    data = load(f"npz:{tmp_path}/a.npz")
    assert data.x_test.shape == (0, 1, 6, 5)
    labelled = torch.where(torch.arange(12) < 3, data.y_train, -1)
    held_out = data.held_out(labelled)
    assert held_out.known
    assert torch.equal(held_out.images, data.x_train[3:])
    assert torch.equal(held_out.truth, data.y_train[3:])
    np.savez(tmp_path / "b.npz", x_train=given["x_train"], y_train=given["y_train"], x_test=given["x_test"])
    data = load(f"npz:{tmp_path}/b.npz")
    assert data.y_test.tolist() == [-1] * 4
    assert not data.held_out(labelled).known
    assert torch.equal(data.held_out(labelled).images, data.x_test)
    np.savez(tmp_path / "c.npz", x_train=given["x_train"], y_train=given["y_train"], y_test=given["y_test"])
    with pytest.raises(UserError, match="lacks the arrays x_test"):
        load(f"npz:{tmp_path}/c.npz")


def test_a_named_set_is_found_as_npz_or_as_torchvisions_files(tmp_path: Path) -> None:
    given = arrays(shape=(28, 28), classes=10)
    np.savez(tmp_path / "fashion_mnist.npz", **given)
    data = load("fashion-mnist", data_dir=str(tmp_path))
    assert data.name == "fashion-mnist"
    assert data.class_names[0] == "T-shirt"
    assert data.class_names[9] == "ankle boot"

    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, prefix in (("train", "train"), ("test", "t10k")):
        images, classes = given[f"x_{part}"], given[f"y_{part}"].astype(np.uint8)
        header = b"\0\0\x08\x03" + np.array(images.shape, ">i4").tobytes()
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = b"\0\0\x08\x01" + np.array(classes.shape, ">i4").tobytes()
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(header + classes.tobytes())
    data = load("mnist", data_dir=str(tmp_path))
    assert torch.equal(data.x_train[:, 0], torch.from_numpy(given["x_train"]))
    assert data.y_test.tolist() == given["y_test"].tolist()


def test_stl10_has_splits_and_columns_first(tmp_path: Path, monkeypatch) -> None:
    from torchvision import datasets

    monkeypatch.setattr(datasets.STL10, "_check_integrity", lambda _: True)
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    given = arrays(shape=(96, 96, 3), classes=10)
    for part in ("train", "test"):
        (folder / f"{part}_X.bin").write_bytes(given[f"x_{part}"].transpose(0, 3, 2, 1).tobytes())
        (folder / f"{part}_y.bin").write_bytes((given[f"y_{part}"] + 1).astype(np.uint8).tobytes())
    (folder / "class_names.txt").write_text("\n".join(map(str, range(10))))
    data = load("stl10", data_dir=str(tmp_path))
    assert torch.equal(data.x_train.permute(0, 2, 3, 1), torch.from_numpy(given["x_train"]))
    assert data.y_train.tolist() == given["y_train"].tolist()
    assert data.x_test.shape == (4, 3, 96, 96)


def test_a_named_set_that_is_not_there_tells_what_to_do(tmp_path: Path, monkeypatch) -> None:
    for name in ("usps", "cifar10", "mnist"):
        with pytest.raises(UserError, match=f"--data {name}: neither {name}.npz nor .* --data-dir .* --download"):
            load(name, data_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"mini_imagenet\.npz is missing"):
        load("mini-imagenet", data_dir=str(tmp_path))
    monkeypatch.setenv("FASTCLUST_DATA", str(tmp_path))
    assert RunConfig().data_dir == str(tmp_path)


def test_a_subset_keeps_every_class_in_proportion_and_the_test_part(tmp_path: Path) -> None:
    classes = np.array([0] * 60 + [1] * 30 + [-1] * 10)
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (100, 6, 5), dtype=np.uint8)
    spec = save(tmp_path, x_train=x, y_train=classes, y_test=np.array([0, 1, 1, 0]))
    data = load(spec, subset=20)
    assert torch.bincount(data.y_train + 1).tolist() == [2, 12, 6]
    assert len(data.x_test) == 4
    place = [int((torch.from_numpy(x) == image[0]).flatten(1).all(1).nonzero()) for image in data.x_train]
    assert data.y_train.tolist() == classes[place].tolist(), "an image left its class"
    assert torch.equal(load(spec, subset=20).x_train, data.x_train)
    assert not torch.equal(load(spec, 1, subset=20).x_train, data.x_train)
    apart = load(spec, subset_test=2)
    assert sorted(apart.y_test.tolist()) == [0, 1]
    assert torch.equal(apart.x_train[:, 0], torch.from_numpy(x))
    for n, message in ((101, "more than the 100"), (1, "fewer than one for each")):
        with pytest.raises(UserError, match=message):
            load(spec, subset=n)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six images of mixed sizes, two files that are none, labels for two."""
    from PIL import Image

    folder = tmp_path / "photos"
    (folder / "deep" / "er").mkdir(parents=True)
    for index, name in enumerate(["a.png", "b.JPG", "deep/c.png", "deep/er/d e.jpeg", "deep/e.png", "f.bmp"]):
        Image.new("RGB", (12 + 9 * index, 40 - 5 * index), (40 * index, 90, 200)).save(folder / name)
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:60])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "notes.txt").write_text("no image")
    (folder / "labels.csv").write_text("\ufefffile,label\na.png,10\ndeep/er/d e.jpeg, 9\n", encoding="utf-8")
    return folder


def test_a_folder_is_every_image_in_it_and_the_labels_of_some(photos: Path, capsys) -> None:
    data = load(f"folder:{photos}", image_size=16)
    assert data.files == ("a.png", "b.JPG", "deep/c.png", "deep/e.png", "deep/er/d e.jpeg", "f.bmp")
    assert data.x_train.shape == (6, 3, 16, 16)
    assert data.x_train[3].float().mean(dim=(1, 2)).tolist() == pytest.approx([160, 90, 200], abs=3)
    assert data.class_names == ("9", "10")
    assert data.y_train.tolist() == [1, -1, -1, -1, 0, -1]
    assert not data.held_out(data.y_train).known
    assert [file for file, _ in data.left_out] == ["broken.png", "empty.jpg"]
    assert all(reason and str(photos) not in reason for _, reason in data.left_out)
    assert capsys.readouterr().err.count("left out") == 2
    part = load(f"folder:{photos}", image_size=16, subset=3)
    assert {"a.png", "deep/er/d e.jpeg"} < set(part.files)
    for image, file in zip(part.x_train, part.files, strict=True):
        assert torch.equal(image, data.x_train[data.files.index(file)])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, r"labels\.csv is missing: a text file with the line file,label"),
        ("a.png,cat\n", "must begin with the line file,label"),
        ("file,label\na.png\n", "line 2: a file and its label are needed"),
        ("file,label\na.png,cat\na.png,dog\n", "line 3: a.png was cat above, here dog"),
        ("file,label\nz.png,cat\ny.png,dog\n", r"names y\.png \(and 1 more\), which is no image"),
        ("file,label\na.png,cat\nbroken.png,dog\n", "names 1 classes of readable images"),
    ],
)
def test_labels_that_do_not_fit_the_folder(photos: Path, labels: str | None, message: str) -> None:
    (photos / "labels.csv").unlink()
    if labels is not None:
        (photos / "labels.csv").write_text(labels)
    with pytest.raises(UserError, match=message):
        load(f"folder:{photos}")


def test_folders_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no folder"):
        load(f"folder:{tmp_path}/none")
    (tmp_path / "labels.csv").write_text("file,label\n")
    with pytest.raises(UserError, match="holds no image that can be read"):
        load(f"folder:{tmp_path}")
    with pytest.raises(UserError, match="--image-size 7"):
        load(f"folder:{tmp_path}", image_size=7)


def test_sixteen_bits_a_pixel_become_eight(tmp_path: Path) -> None:
    from PIL import Image

    Image.fromarray((np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16)).save(tmp_path / "deep.png")
    image = read_image(tmp_path / "deep.png", 1, (64, 64))
    assert image.float().mean() == pytest.approx(127.5, abs=1)


def test_image_files_of_any_size_mode_and_turn(tmp_path: Path) -> None:
    from PIL import Image

    wide = np.zeros((20, 60), np.uint8)
    wide[:, 20:40] = 200
    Image.fromarray(wide).save(tmp_path / "wide.png")
    image = read_image(tmp_path / "wide.png", 3, (10, 10))
    assert image.shape == (3, 10, 10)
    assert image.float().mean() == pytest.approx(200, abs=8)  # the middle third is what a central crop keeps
    Image.fromarray(wide).convert("P").save(tmp_path / "sub.GIF")
    assert read_image(tmp_path / "sub.GIF", 1, (7, 9)).shape == (1, 7, 9)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    side = np.zeros((8, 8), np.uint8)
    side[:, :4] = 255
    Image.fromarray(side).save(tmp_path / "side.jpg", exif=exif, quality=95)
    upright = read_image(tmp_path / "side.jpg", 1, (8, 8))[0]
    assert upright[:4].min() > 200
    assert upright[4:].max() < 50
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "side.jpg").read_bytes()[:100])
    (tmp_path / "notes.txt").write_text("no image")
    assert [path.name for path in find_images(tmp_path)] == ["broken.jpg", "side.jpg", "sub.GIF", "wide.png"]
    for name in ("broken.jpg", "notes.txt"):
        with pytest.raises((OSError, ValueError)):
            read_image(tmp_path / name, 1, (8, 8))
