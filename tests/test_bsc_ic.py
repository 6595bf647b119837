"""BSC-IC: each term against its equation in float64, views, whole runs, collapse and its warning, what a run leaves."""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from methods import bsc_ic, predict
from methods.bsc_ic import (
    PRESETS,
    Config,
    Critic,
    Learner,
    cluster_discrimination,
    gradient_penalty,
    load_merged,
    train,
)
from methods.bsc_ic_settings import PAPER
from methods.common import networks, sources
from methods.common.errors import UserError
from methods.common.run import load_checkpoint
from methods.common.training import settle_statistics
from methods.common.views import Views, colour_jitter, turn_hue

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def stripes(write_stripes) -> Path:
    return write_stripes(90, 30, contrast=150)


@pytest.fixture
def small(stripes: Path, tmp_path: Path) -> Config:
    """Settings of a run that takes a second or less."""
    return dataclasses.replace(
        PAPER,
        data=f"npz:{stripes}",
        runs=str(tmp_path / "runs"),
        threads=1,
        epochs=2,
        batch=40,
        crop=0.8,
        lr=1e-3,
        tau=0.9,
        critic_width=64,
        report=False,
    )


def log_assignments(n: int, k: int) -> Tensor:
    return torch.randn(n, k, dtype=torch.float64).mul(2).log_softmax(dim=1)


def plain_kl(p: Tensor, q: Tensor) -> float:
    return sum(float(p[i, k] * (p[i, k] / q[i, k]).log()) for i in range(len(p)) for k in range(p.shape[1])) / len(p)


# ----------------------------------------------------------------------------------------------------------- equations


@pytest.mark.parametrize("order", ["target-online", "online-target"])
def test_mutual_improvement_is_eq_2(order: str) -> None:
    online, target = ((log_assignments(5, 4), log_assignments(5, 4)) for _ in range(2))
    (a, b), (ta, tb) = ([x.exp() for x in pair] for pair in (online, target))
    pairs = [(tb, a), (ta, b)] if order == "target-online" else [(a, tb), (b, ta)]
    expected = sum(plain_kl(p, q) for p, q in pairs)
    torch.testing.assert_close(float(bsc_ic.mutual_improvement(online, target, order)), expected, rtol=1e-12, atol=0)


def test_cluster_discrimination_is_eq_7() -> None:
    a, b = log_assignments(6, 4).exp(), log_assignments(6, 4).exp()
    expected = 0.0
    for i in range(4):
        for j in range(4):
            c = float(a[:, i] @ b[:, j] / (a[:, i].norm() * b[:, j].norm()))
            expected += (c - 1) ** 2 if i == j else c**2 / 3
    torch.testing.assert_close(float(cluster_discrimination(a, b)), expected, rtol=1e-12, atol=0)
    assert float(cluster_discrimination(a, b, 0.0)) < expected < float(cluster_discrimination(a, b, 1.0))


def test_an_empty_cluster_gives_finite_gradients() -> None:
    a = torch.eye(3, 4, dtype=torch.float64).requires_grad_()
    cluster_discrimination(a, a).backward()
    assert a.grad is not None
    assert a.grad.isfinite().all()


def test_gradient_penalty_of_a_critic_whose_gradient_is_known() -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

        def forward(self, r: Tensor) -> Tensor:
            return self.weight * r.square().sum(dim=1)

    critic, r = Square(), log_assignments(6, 4).exp()
    penalty = gradient_penalty(critic, r)
    penalty.backward()
    norm = 2 * r.norm(dim=1)  # of the gradient at weight 1
    torch.testing.assert_close(penalty.detach(), (0.7 * norm - 1).square().mean())
    torch.testing.assert_close(critic.weight.grad, (2 * (0.7 * norm - 1) * norm).mean())


def test_the_terms_of_a_step_are_those_of_the_networks_before_it(small: Config) -> None:
    data, _ = load_merged(small)
    config = dataclasses.replace(small, crop=1.0)  # both views are the image itself
    learner = Learner(config, data)
    learner.online.train()
    images = data.x_train[:20]
    with torch.no_grad():
        for parameter in learner.target.parameters():
            parameter.mul_(1.1)
        twice = torch.cat([images, images]) / 255
        z, t = (network(twice).double().softmax(dim=1) for network in (learner.online, learner.target))
        expected = {"loss_mi": plain_kl(t[20:], z[:20]) + plain_kl(t[:20], z[20:]), "loss_si": 0.0}
        expected["loss_clu"] = float(cluster_discrimination(z[:20], z[20:]))
        expected["loss_adv"] = -float(learner.critic(z.float()).mean())
        assert expected["loss_mi"] > 1e-3
        before = [parameter.clone() for parameter in learner.target.parameters()]
    found = {name: float(value) for name, value in learner.step(images).items()}
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-5)
    weights = {"mi": config.alpha_mi, "si": config.alpha_si, "clu": config.alpha_clu, "adv": config.alpha_adv}
    total = sum(weight * found[f"loss_{name}"] for name, weight in weights.items())
    assert found["loss"] == pytest.approx(total, rel=1e-5)
    assert found["agreement"] == 1.0
    # eq. 10, with the online network as the step left it.
    for old, new, online in zip(before, learner.target.parameters(), learner.online.parameters(), strict=True):
        torch.testing.assert_close(new, config.tau * old + (1 - config.tau) * online.detach())


def test_the_critic_learns_to_tell_one_hots_from_soft_assignments(small: Config) -> None:
    learner = Learner(dataclasses.replace(small, clusters=4, critic_width=1024), load_merged(small)[0])
    soft, sharp = torch.full((64, 4), 0.25), torch.eye(4)
    for _ in range(60):
        found = learner.critic_step(soft)
    assert learner.critic(sharp).mean() > learner.critic(soft).mean() + 0.3
    assert found["loss_critic"] < 0
    assert found["penalty"] < 0.5
    assert Critic(4)(soft).shape == (64,)


# --------------------------------------------------------------------------------------------------------------- views


def test_views_without_changes_are_the_images() -> None:
    images = torch.randint(256, (3, 3, 6, 9), dtype=torch.uint8)
    torch.testing.assert_close(Views()(images), images / 255)
    flipped = Views(flip=True)(images[:1].expand(50, -1, -1, -1))
    mirrored = (flipped - images[:1].flip(3) / 255).flatten(1).abs().amax(dim=1) < 1e-5
    same = (flipped - images[:1] / 255).flatten(1).abs().amax(dim=1) < 1e-5
    assert (mirrored ^ same).all()
    assert 10 < mirrored.sum() < 40


def test_a_crop_shows_the_share_of_the_area_that_it_keeps() -> None:
    ramp = torch.arange(0, 256, 4, dtype=torch.uint8).expand(400, 1, 64, 64)  # grey tells the column
    views = Views(crop=0.4)(ramp)
    width = (views[:, 0, 0, -1] - views[:, 0, 0, 0]) * 255 / 252
    assert 0.54 < width.min() < 0.65
    assert width.max() > 0.95
    centre = views.mean(dim=(1, 2, 3))
    assert centre.std() > 0.03
    assert abs(float(centre.mean()) - 126 / 255) < 0.02
    assert (views.amax(dim=2) - views.amin(dim=2)).max() < 1e-4  # columns stay columns


def test_zoom_and_stretch_change_sides_and_gamma_brightness() -> None:
    square = torch.zeros(200, 1, 32, 32, dtype=torch.uint8)
    square[:, :, 8:24, 8:24] = 255
    zoomed, stretched = Views(zoom=0.5)(square), Views(stretch=0.3)(square)

    def sides(views: Tensor) -> tuple[Tensor, Tensor]:
        return views[:, 0, 16].sum(dim=1), views[:, 0, :, 16].sum(dim=1)

    across, down = sides(zoomed)
    torch.testing.assert_close(across, down, rtol=0, atol=1e-3)
    assert 9.5 < across.min() < 11
    assert 24 < across.max() < 26.6
    across, down = sides(stretched)
    torch.testing.assert_close(across * down, torch.full((200,), 256.0), rtol=0.05, atol=0)
    assert across.max() / down[across.argmax()] > 1.6
    grey = torch.full((200, 1, 4, 4), 64, dtype=torch.uint8)
    power = Views(gamma=0.5)(grey)[:, 0, 0, 0].log() / math.log(64 / 255)
    assert 0.6 < power.min() < 0.65
    assert 1.55 < power.max() < 1.65


def test_hue_turns_as_in_hsv_and_grey_has_none() -> None:
    red = torch.tensor([0.8, 0.1, 0.1])[None, :, None, None]
    third = torch.full((1, 1, 1), 1 / 3)
    torch.testing.assert_close(turn_hue(red, third).flatten(), torch.tensor([0.1, 0.8, 0.1]))
    image = torch.rand(4, 3, 5, 5)
    torch.testing.assert_close(turn_hue(image, torch.zeros(4, 1, 1)), image)
    grey = torch.full((4, 3, 5, 5), 0.5)
    assert (colour_jitter(grey, 0.8).std(dim=1) < 1e-6).all()
    jittered = colour_jitter(image, 0.8)
    assert jittered.min() >= 0
    assert jittered.max() <= 1
    assert (jittered - image).abs().max() > 0.05


# --------------------------------------------------------------------------------------------------------- whole runs


def test_a_run_clusters_the_stripes_and_leaves_its_files(small: Config, tmp_path: Path, capsys) -> None:
    run = train(dataclasses.replace(small, epochs=8, autoencoder_epochs=2, report=True))
    result = json.loads((run.path / "result.json").read_text())
    assert result["acc"] > 90
    assert result["used"] == 3
    assert result["information"] > 0.3
    assert {"train_acc", "test_nmi", "kmeans_acc", "kmeans_autoencoder_acc", "entropy"} <= result.keys()
    with np.load(run.path / "assignments.npz") as file:
        arrays = dict(file)
    assert arrays["probabilities"].shape == (120, 3)
    assert arrays["probabilities"].dtype == np.float32
    np.testing.assert_allclose(arrays["probabilities"].sum(axis=1), 1, atol=1e-5)
    assert arrays["embeddings"].shape == (120, 256)
    assert arrays["embeddings"].dtype == np.float32
    np.testing.assert_array_equal(arrays["labels"], arrays["probabilities"].argmax(axis=1))
    assert "Confusion matrix" in (run.path / "report.html").read_text()
    assert "warning" not in capsys.readouterr().err
    # The trained network gives the same clusters to the same images read from a file.
    np.savez(tmp_path / "new.npz", x=np.load(small.data.removeprefix("npz:"))["x_test"])
    rows = list(csv.DictReader(predict.predict(run.path, [tmp_path / "new.npz"], "cpu").splitlines()))
    assert [int(row["label"]) for row in rows] == arrays["labels"][90:].tolist()


def test_a_resumed_run_ends_with_the_same_bits(small: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    small = dataclasses.replace(small, epochs=2, starts=2, start_epochs=1)
    whole = load_checkpoint(train(small).path)
    calls = []  # two starts, then what follows
    original = Learner.training_pass

    def stop_in_the_second(self: Learner, *arguments: object) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(Learner, "training_pass", stop_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        train(small)
    (begun,) = [f.parent for f in Path(small.runs).glob("*/checkpoint.pt") if not (f.parent / "result.json").exists()]
    resumed = load_checkpoint(train(small, begun).path)
    for part in ("network", "target", "critic"):
        for name, value in whole["state"][part].items():
            assert torch.equal(value, resumed["state"][part][name]), (part, name)


def test_the_start_of_least_score_goes_on(small: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = Learner.epoch

    def watched(self: Learner, *arguments: object) -> dict:
        metrics = original(self, *arguments)
        seen.append((metrics["score"], next(self.online.parameters()).detach().clone()))
        return metrics | {"acc": 0.0, "seconds": 7.0}  # nobody may look at the first

    monkeypatch.setattr(Learner, "epoch", watched)
    run = train(dataclasses.replace(small, starts=3, start_epochs=1, epochs=1))
    scores = [score for score, _ in seen]
    best = scores.index(min(scores))
    assert len(set(scores)) == 3
    assert run.history[0]["start"] == best + 1
    assert run.history[0]["score"] == scores[best]
    assert run.history[0]["seconds"] == 21.0
    state = load_checkpoint(run.path)["state"]
    assert torch.equal(next(iter(v for k, v in state["network"].items() if k == "body.0.weight")), seen[best][1])


def test_settled_statistics_change_the_answers_and_not_the_steps(small: Config) -> None:
    """The network answers by the statistics of the images as they are, after each epoch; its weights are the same."""
    settled = dataclasses.replace(small, epochs=2, starts=1, settle=True)
    unsettled = dataclasses.replace(settled, settle=False)
    left, kept = (load_checkpoint(train(config).path)["state"] for config in (unsettled, settled))
    weights = [name for name in left["network"] if "running" not in name and "num_batches" not in name]
    assert all(torch.equal(left["network"][name], kept["network"][name]) for name in weights)
    data, _ = load_merged(settled)
    network = networks.build(**kept["architecture"])
    network.load_state_dict(kept["network"])
    before = copy.deepcopy(network.state_dict())
    settle_statistics(network, data.x_train, settled.batch)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    name = next(name for name in before if name.endswith("running_mean"))
    assert not torch.equal(left["network"][name], before[name])


def test_the_score_does_not_know_the_constant_of_the_critic(small: Config) -> None:
    means = {"loss_mi": 0.5, "loss_si": 0.25, "loss_clu": 2.0, "loss_adv": 7.0, "loss_critic": 0.3, "penalty": 0.1}
    # 2 · 0.5 + 4 · 0.25 + 1 · 2, and the critic's distance, E D(p) - E D(z) = 10 · 0.1 - 0.3.
    assert bsc_ic.score(means, small) == pytest.approx(4.7)
    assert bsc_ic.score(means, dataclasses.replace(small, alpha_adv=0.0)) == pytest.approx(4.0)


def test_truth_is_for_the_report_alone(small: Config, tmp_path: Path) -> None:
    with np.load(small.data.removeprefix("npz:")) as file:
        np.savez(tmp_path / "blind.npz", x_train=file["x_train"], x_test=file["x_test"])
    blind = train(dataclasses.replace(small, data=f"npz:{tmp_path / 'blind.npz'}", clusters=3, report=True))
    assert "acc" not in blind.history[-1]
    assert "acc" not in json.loads((blind.path / "result.json").read_text())
    assert "Predicted classes" in (blind.path / "report.html").read_text()
    seen = train(small)
    assert seen.history[-1]["loss"] == blind.history[-1]["loss"]


def test_without_both_discriminations_it_collapses_and_says_why(small: Config, capsys) -> None:
    run = train(dataclasses.replace(small, alpha_adv=0.0, alpha_clu=0.0, epochs=6))
    assert run.history[-1]["information"] < 0.1
    assert "loss_adv" not in run.history[-1]
    assert "loss_critic" not in run.history[-1]
    assert "--alpha-adv and --alpha-clu are 0" in capsys.readouterr().err


def test_superclasses_of_cifar100(small: Config, tmp_path: Path) -> None:
    assert np.bincount(sources._SUPERCLASS).tolist() == [5] * 20
    classes = np.arange(100)
    images = np.zeros((100, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "cifar100.npz", x_train=images, y_train=classes, x_test=images, y_test=classes)
    data, n_train = load_merged(dataclasses.replace(small, data="cifar100-20", data_dir=str(tmp_path)))
    assert data.n_classes == 20
    assert n_train == 100
    assert data.x_train.shape == (200, 3, 32, 32)
    assert data.y_train[[4, 55, 99]].tolist() == [0, 0, 13]  # beaver and otter: aquatic mammals; worm: invertebrates


def test_resnet18_takes_a_step_on_colour(small: Config, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3)).astype(np.uint8)
    np.savez(tmp_path / "colour.npz", x_train=images)
    config = dataclasses.replace(PRESETS["cifar10"], data=f"npz:{tmp_path / 'colour.npz'}", clusters=2)
    data, _ = load_merged(config)
    learner = Learner(config, data)
    assert learner.architecture["name"] == "resnet18"
    assert all(value.isfinite() for value in learner.step(data.x_train).values())
    assert learner.embeddings().shape == (8, 512)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"clusters": 1}, "--clusters"),
        ({"clusters": 500}, "fewer than the 500"),
        ({"batch": 1}, "--batch"),
        ({"crop": 0.0}, "--crop"),
        ({"alpha_si": -1.0}, "--alpha-si"),
        ({"alpha_adv": 0.0, "alpha_si": 0.0, "alpha_mi": 0.0, "alpha_clu": 0.0}, "no loss"),
        ({"tau": 2.0}, "--tau"),
        ({"critic_steps": 0}, "--critic-steps"),
    ],
)
def test_settings_that_cannot_work_are_refused_first(small: Config, changes: dict, word: str) -> None:
    with pytest.raises(UserError, match=word):
        train(dataclasses.replace(small, **changes))
    assert not Path(small.runs).exists()


def test_the_command_line(refusal) -> None:
    assert "nowhere.npz" in refusal(bsc_ic, ["--data", "npz:nowhere.npz"])
