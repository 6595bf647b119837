"""RandAugment: every operation against torchvision's, image by image, at its strengths."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from methods.common import randaugment
from methods.common.augment import Augment
from methods.common.randaugment import OPERATIONS, rand_augment


def images(n: int = 12, channels: int = 3, height: int = 12, width: int = 10) -> torch.Tensor:
    return torch.randint(20, 220, (n, channels, height, width), dtype=torch.uint8)


EXPECTED = {
    "auto_contrast": lambda x, s: tv.autocontrast(x),
    "brightness": lambda x, s: tv.adjust_brightness(x, 0.05 + 0.9 * s),
    "color": lambda x, s: tv.adjust_saturation(x, 0.05 + 0.9 * s),
    "contrast": lambda x, s: tv.adjust_contrast(x, 0.05 + 0.9 * s),
    "equalize": lambda x, s: tv.equalize(x),
    "identity": lambda x, s: x,
    "posterize": lambda x, s: tv.posterize(x, 4 + min(int(5 * s), 4)),
    "rotate": lambda x, s: tv.rotate(x, (2 * s - 1) * 30, interpolation=InterpolationMode.NEAREST),
    "sharpness": lambda x, s: tv.adjust_sharpness(x, 0.05 + 0.9 * s),
    "solarize": lambda x, s: tv.solarize(x.float() / 255, s).mul(255),
}


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("channels", [1, 3])
def test_operation_is_torchvisions(name: str, channels: int) -> None:
    x = images(channels=channels)
    strength = torch.rand(len(x))
    y = OPERATIONS[name](x.float() / 255, strength[:, None, None, None]).clamp(0, 1) * 255
    for image, s, changed in zip(x, strength.tolist(), y, strict=True):
        expected = EXPECTED[name](image, s).float()
        differs = (changed - expected).abs() > 2
        assert differs.float().mean() < (0.03 if name == "rotate" else 1e-6), (name, s)


def test_translations_and_shears_move_by_their_strength() -> None:
    x = torch.zeros(2, 1, 20, 20)
    x[:, :, 9:11, 9:11] = 1
    strength = torch.tensor([0.0, 1.0])[:, None, None, None]  # from one end of the range to the other
    y = OPERATIONS["translate_x"](x, strength)
    assert [columns.nonzero().flatten().tolist() for columns in y[:, 0, 9]] == [[15, 16], [3, 4]]
    y = OPERATIONS["translate_y"](x, strength)
    assert [rows.nonzero().flatten().tolist() for rows in y[:, 0, :, 9]] == [[15, 16], [3, 4]]
    line = torch.zeros(2, 1, 20, 20)
    line[:, :, :, 10] = 1
    y = OPERATIONS["shear_x"](line, strength)[:, 0]
    first, last = y[:, 0].argmax(dim=1), y[:, -1].argmax(dim=1)
    assert (last - first).tolist() == pytest.approx([0.3 * 19, -0.3 * 19], abs=1)
    y = OPERATIONS["shear_y"](line.transpose(2, 3), strength)[:, 0]
    first, last = y[:, :, 0].argmax(dim=1), y[:, :, -1].argmax(dim=1)
    assert (last - first).tolist() == pytest.approx([0.3 * 19, -0.3 * 19], abs=1)


def test_each_image_gets_one_operation_drawn_evenly(monkeypatch) -> None:
    monkeypatch.setattr(
        randaugment, "OPERATIONS", {f"{k}": lambda x, _, k=k: torch.full_like(x, k / 14) for k in range(14)}
    )
    x = torch.zeros(4200, 1, 4, 4)
    counts = torch.bincount((rand_augment(x)[:, 0, 0, 0] * 14).round().long(), minlength=14)
    assert counts.sum() == 4200
    assert 220 < int(counts.min()) <= int(counts.max()) < 380
    assert torch.equal(rand_augment(x, 0), x)


def test_the_list_is_fixmatchs_and_the_result_stays_in_range() -> None:
    assert len(OPERATIONS) == 14
    x = images(200, channels=1)
    torch.manual_seed(1)
    y = Augment(pad=1, flip=True, rand_augment=2)(x)
    assert y.shape == x.shape
    assert y.dtype == torch.float32
    assert 0 <= float(y.min()) <= float(y.max()) <= 1
    torch.manual_seed(1)
    assert torch.equal(y, Augment(pad=1, flip=True, rand_augment=2)(x))
    assert math.isfinite(float(y.sum()))
