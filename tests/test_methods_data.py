"""Image sets: what is read right, and what is refused in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from methods.common.data import choose_labelled, load
from methods.common.errors import UserError
from methods.common.images import find_images, read_image


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
    data = load("digits", seed=0)
    assert data.x_train.shape == (1437, 1, 8, 8)
    assert data.x_test.shape == (360, 1, 8, 8)
    assert data.x_train.dtype == torch.uint8
    assert int(data.x_train.max()) == 255
    assert data.class_names == tuple("0123456789")
    assert torch.bincount(data.y_test).tolist() == pytest.approx([36] * 10, abs=1)
    assert load("digits", seed=0).fingerprint() == data.fingerprint() != load("digits", seed=1).fingerprint()


def test_npz_grey_and_colour_keep_every_pixel_in_place(tmp_path: Path) -> None:
    given = arrays()
    data = load(save(tmp_path), seed=0)
    assert data.x_train.shape == (12, 1, 6, 5)
    assert torch.equal(data.x_train[:, 0], torch.from_numpy(given["x_train"]))
    given = arrays(shape=(6, 5, 3))
    np.savez(tmp_path / "colour.npz", **given)
    data = load(f"npz:{tmp_path}/colour.npz", seed=0)
    assert data.image_size == (6, 5)
    assert torch.equal(data.x_test.permute(0, 2, 3, 1), torch.from_numpy(given["x_test"]))


def test_npz_classes_are_numbered_in_order_and_minus_one_means_unknown(tmp_path: Path) -> None:
    y_train = np.array([30, 10, -1, 20] * 3)
    data = load(save(tmp_path, y_train=y_train, y_test=np.array([10, 20, 30, 30])), seed=0)
    assert data.class_names == ("10", "20", "30")
    assert data.y_train.tolist() == [2, 0, -1, 1] * 3
    assert data.y_test.tolist() == [0, 1, 2, 2]


def test_pixel_statistics_are_those_of_the_floats(tmp_path: Path) -> None:
    np.savez(tmp_path / "colour.npz", **arrays(shape=(6, 5, 3)))
    data = load(f"npz:{tmp_path}/colour.npz", seed=0)
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
        ({"x_test": np.zeros((0, 6, 5), np.uint8), "y_test": np.zeros(0, int)}, "x_test holds no image"),
        ({"x_train": np.zeros((12, 3, 3), np.uint8)}, "4 x 4 is the least"),
        ({"y_train": np.arange(11)}, r"y_train must be \(12,\)"),
        ({"y_train": np.linspace(0, 1, 12)}, "y_train must hold integers"),
        ({"y_train": np.zeros(12, int), "y_test": np.zeros(4, int)}, "names 1 classes"),
        ({"y_test": np.array([0, 1, 2, 7])}, "y_test holds class 7"),
    ],
)
def test_npz_of_wrong_contents(tmp_path: Path, replaced: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(save(tmp_path, **replaced), seed=0)


def test_npz_that_cannot_be_read(tmp_path: Path) -> None:
    whole = Path(save(tmp_path).removeprefix("npz:")).read_bytes()
    for content in (b"", b"no archive", whole[: len(whole) // 2], whole[:200] + b"\xff" * 60 + whole[260:]):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(UserError, match=r"bad\.npz"):
            load(f"npz:{tmp_path}/bad.npz", seed=0)
    with pytest.raises(UserError, match="No such file"):
        load(f"npz:{tmp_path}/none.npz", seed=0)
    with pytest.raises(UserError, match="directory"):
        load(f"npz:{tmp_path}", seed=0)
    np.savez(tmp_path / "objects.npz", **(arrays() | {"x_train": np.array([{}, "a"], dtype=object)}))
    with pytest.raises(UserError, match="plain arrays"):
        load(f"npz:{tmp_path}/objects.npz", seed=0)
    np.savez(tmp_path / "short.npz", x_train=arrays()["x_train"])
    with pytest.raises(UserError, match="lacks the arrays y_train, x_test, y_test"):
        load(f"npz:{tmp_path}/short.npz", seed=0)
    with pytest.raises(UserError, match="--data imagenet is unknown"):
        load("imagenet", seed=0)


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
