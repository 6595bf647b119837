"""Augmentation in batches: what each change does to pixels, image by image."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from methods.common.augment import Augment, to_float


def images(n: int = 64, channels: int = 3, height: int = 9, width: int = 7) -> torch.Tensor:
    return torch.randint(0, 256, (n, channels, height, width), dtype=torch.uint8)


def test_nothing_asked_is_nothing_done() -> None:
    x = images()
    assert torch.equal(Augment()(x), to_float(x))
    assert to_float(x).max() <= 1


def test_pad_gives_a_crop_of_the_mirrored_image() -> None:
    x = images()
    y = Augment(pad=2)(x)
    padded = F.pad(to_float(x), (2, 2, 2, 2), mode="reflect")
    moves = set()
    for i in range(len(x)):
        found = [(r, c) for r in range(5) for c in range(5) if torch.equal(y[i], padded[i, :, r : r + 9, c : c + 7])]
        assert found, "not a crop of the padded image"
        moves.update(found)
    assert len(moves) > 15, "all 25 moves should occur among 64 images"


def test_flip_mirrors_about_half_of_the_images_left_to_right() -> None:
    x = images(400)
    y = Augment(flip=True)(x)
    same = (y == to_float(x)).flatten(1).all(1)
    mirrored = (y == to_float(x).flip(3)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 150 < int(mirrored.sum()) < 250


def test_shift_moves_by_whole_pixels_where_the_draw_is_whole(monkeypatch) -> None:
    x = images(4, 1)
    # angle, zoom, move right, move down: draws of 1 are the greatest change.
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.tensor([[0.5], [0.5], [1.0], [0.5]]).expand(*size))
    y = Augment(shift=2.0)(x)
    torch.testing.assert_close(y[..., :-2], to_float(x)[..., 2:], atol=1e-5, rtol=0)
    assert (y[..., -2:] == 0).all()


def test_rotation_by_a_right_angle_turns_an_oblong_image_without_stretching(monkeypatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.tensor([[1.0], [0.5], [0.5], [0.5]]).expand(*size))
    x = torch.zeros(1, 1, 5, 9, dtype=torch.uint8)
    x[0, 0, 2, 3:6] = 255  # a bar of three pixels lying in the middle
    y = Augment(rotate=90)(x)
    standing = torch.zeros(1, 1, 5, 9)
    standing[0, 0, 1:4, 4] = 1
    torch.testing.assert_close(y, standing, atol=1e-4, rtol=0)


def test_zoom_enlarges(monkeypatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.tensor([[0.5], [1.0], [0.5], [0.5]]).expand(*size))
    x = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    x[0, 0, 3:5, 3:5] = 255
    assert Augment(scale=1.0)(x).sum() == 16  # twice the size is four times the area


def test_same_seed_same_images() -> None:
    x = images()
    augment = Augment(pad=1, flip=True, rotate=10, scale=0.1, shift=1)
    torch.manual_seed(3)
    first = augment(x)
    torch.manual_seed(3)
    assert torch.equal(first, augment(x))
    assert not torch.equal(first, augment(x))


def test_cutout_blackens_a_square_cut_off_at_the_border() -> None:
    white = torch.full((400, 3, 9, 7), 255, dtype=torch.uint8)
    black = Augment(cutout=4)(white) == 0
    assert (black == black[:, :1]).all(), "channels share the square"
    rows, columns = black[:, 0].any(dim=2), black[:, 0].any(dim=1)
    assert torch.equal(black[:, 0], rows[:, :, None] & columns[:, None, :])
    for side, size in ((rows, 9), (columns, 7)):
        lengths = side.sum(dim=1)
        assert set(lengths.tolist()) == {2, 3, 4}
        first, last = side.int().argmax(dim=1), size - 1 - side.flip(1).int().argmax(dim=1)
        assert torch.equal(last - first + 1, lengths), "one piece"
        whole = lengths == 4
        assert set(first[whole].tolist()) == set(range(size - 3))
        assert ((first[~whole] == 0) | (last[~whole] == size - 1)).all()
