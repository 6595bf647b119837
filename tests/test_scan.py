"""SimCLR and SCAN: losses against their formulas in float64, neighbours, whole runs, what a run leaves."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from methods.common import contrastive
from methods.common.contrastive import SimCLR, nt_xent
from methods.common.progress import Progress
from methods.common.sources import load_npz
from methods.common.views import Views

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = contrastive.Settings(
    seed=0, epochs=2, lr=0.1, batch=40, momentum=0.9, weight_decay=1e-4, temperature=0.2, views=Views(crop=0.7)
)
SHAPE = {
    "name": "cnn-small",
    "n_channels": 1,
    "image_size": (8, 8),
    "n_outputs": 3,
    "weight_norm": False,
    "unit_length": False,
}

# --------------------------------------------------------------------------------------------------- views, and SimCLR


def test_shear_slants_and_keeps_rows() -> None:
    line = torch.zeros(200, 1, 33, 17, dtype=torch.uint8)
    line[:, :, :, 8] = 255
    views = Views(shear=0.4)(line)
    place = (views[:, 0] * torch.arange(17)).sum(dim=2) / views[:, 0].sum(dim=2)
    torch.testing.assert_close(place[:, 16], torch.full((200,), 8.0))
    slant = (place[:, 20] - place[:, 12]) / 8
    assert 0.38 < slant.max() <= 0.401
    assert -0.401 <= slant.min() < -0.38
    assert slant.mean().abs() < 0.06


def test_nt_xent_is_simclrs_eq_1() -> None:
    a, b = (F.normalize(torch.randn(5, 3, dtype=torch.float64), dim=1) for _ in range(2))
    z, total = torch.cat([a, b]), 0.0
    for i in range(10):
        others = sum(math.exp(float(z[i] @ z[j]) / 0.3) for j in range(10) if j != i)
        total -= math.log(math.exp(float(z[i] @ z[(i + 5) % 10]) / 0.3) / others)
    torch.testing.assert_close(float(nt_xent(a, b, 0.3)), total / 10, rtol=1e-12, atol=0)


def test_simclr_is_trained_once_and_tells_stripes_apart(write_stripes, tmp_path: Path, monkeypatch) -> None:
    data = load_npz(write_stripes(90, 0))
    settings = dataclasses.replace(SMALL, epochs=6)
    first = SimCLR(SHAPE, data, settings, tmp_path, 16)
    torch.manual_seed(5)  # what else a run has drawn does not matter
    first.train(Progress(0))
    assert first.losses[-1] < first.losses[0] - 0.1
    z = F.normalize(first.embeddings(data.x_train), dim=1)
    near = (z @ z.T).fill_diagonal_(-2).argmax(dim=1)
    assert (data.y_train[near] == data.y_train).double().mean() > 0.9
    assert first.embeddings(data.x_train, projected=True).norm(dim=1).sub(1).abs().max() < 1e-5

    monkeypatch.setattr(SimCLR, "loss", lambda *_: pytest.fail("trained again"))
    again = SimCLR(SHAPE | {"n_outputs": 7}, data, settings, tmp_path, 16)
    assert again.done_steps == again.total_steps
    assert torch.equal(again.embeddings(data.x_train), first.embeddings(data.x_train))
    classifier = again.start(SHAPE)
    classifier.eval()
    assert torch.equal(classifier.features(data.x_train / 255), first.embeddings(data.x_train))
    assert classifier(data.x_train / 255).shape == (90, 3)
    for other in ({"seed": 1}, {"temperature": 0.3}, {"views": Views(crop=0.6)}, {"weight_decay": 0.0}):
        assert SimCLR(SHAPE, data, dataclasses.replace(settings, **other), tmp_path, 16).epoch == 0
