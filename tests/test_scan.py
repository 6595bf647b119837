"""SimCLR and SCAN: losses against their formulas in float64, neighbours, whole runs, what a run leaves."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastclust
from methods import predict, scan
from methods.common import contrastive
from methods.common.contrastive import SimCLR, nt_xent
from methods.common.progress import Progress
from methods.common.run import load_checkpoint
from methods.common.sources import load, load_npz
from methods.common.views import Views
from methods.scan import PRESETS, Config, Learner, scan_terms, self_label_loss, train, with_neighbours

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


def test_light_changes_brightness_and_contrast_of_grey_images() -> None:
    images = torch.tensor([100, 140], dtype=torch.uint8).expand(300, 1, 4, 2)
    views = Views(light=0.5)(images)[:, 0, 0] * 255
    brightness, contrast = views.mean(dim=1) / 120, (views[:, 1] - views[:, 0]) / 40
    assert 0.5 <= brightness.min() < 0.53
    assert 1.47 < brightness.max() <= 1.501
    factor = contrast / brightness
    assert 0.5 <= factor.min() < 0.53
    assert 1.47 < factor.max() <= 1.501
    assert torch.corrcoef(torch.stack([factor, brightness]))[0, 1].abs() < 0.2


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


# -------------------------------------------------------------------------------------------------------------- losses


def log_assignments(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).mul(2).log_softmax(dim=-1)


def test_scans_loss_is_eq_2() -> None:
    log_p, log_q = log_assignments(2, 6, 4), log_assignments(2, 6, 4)
    consistency, entropy = scan_terms(log_p, log_q)
    for head in range(2):
        p, q = log_p[head].exp(), log_q[head].exp()
        expected = -sum(math.log(sum(float(p[i, k] * q[i, k]) for k in range(4))) for i in range(6)) / 6
        assert float(consistency[head]) == pytest.approx(expected, rel=1e-12)
        mean = [float(p[:, k].mean()) for k in range(4)]
        assert float(entropy[head]) == pytest.approx(-sum(m * math.log(m) for m in mean), rel=1e-12)


def test_scans_loss_of_certain_assignments_is_finite() -> None:
    logits = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True)
    consistency, entropy = scan_terms(logits.log_softmax(dim=1), logits.flip(0).log_softmax(dim=1))
    (consistency - 5 * entropy).backward()
    assert float(consistency.detach()) == pytest.approx(200 - math.log(2), rel=1e-4)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_each_image_meets_each_of_its_neighbours() -> None:
    log_p = log_assignments(1, 4, 3)
    images, others = with_neighbours(log_p, torch.tensor([[1, 2], [0, 3], [3, 0], [2, 1]]))
    assert torch.equal(images[0], log_p[0, [0, 0, 1, 1, 2, 2, 3, 3]])
    assert torch.equal(others[0], log_p[0, [1, 2, 0, 3, 3, 0, 2, 1]])


def test_self_labelling_weighs_a_class_by_the_inverse_of_its_share() -> None:
    logits = torch.randn(7, 4, dtype=torch.float64)
    targets = torch.full((7, 4), 0.002, dtype=torch.float64)
    labels = [0, 0, 0, 1, 1, 3, 2]
    targets[range(7), labels] = 0.994
    targets[6] = torch.tensor([0.3, 0.3, 0.4, 0.0])  # not confident
    share = {0: 3 / 6, 1: 2 / 6, 3: 1 / 6}
    top = sum(-float(logits[i].log_softmax(0)[labels[i]]) / share[labels[i]] for i in range(6))
    expected = top / sum(1 / share[labels[i]] for i in range(6))
    assert float(self_label_loss(logits, targets, 0.99)) == pytest.approx(expected, rel=1e-12)


def test_a_batch_without_a_confident_image_has_no_loss() -> None:
    logits = torch.randn(5, 3, requires_grad=True)
    loss = self_label_loss(logits, torch.full((5, 3), 1 / 3), 0.99)
    loss.backward()
    assert loss == 0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


# ---------------------------------------------------------------------------------------------------------- the learner


@pytest.fixture
def small(write_stripes, tmp_path: Path) -> Config:
    """Settings of a run that takes a second or two."""
    return dataclasses.replace(
        PRESETS["digits"],
        data=f"npz:{write_stripes(90, 30)}",
        runs=str(tmp_path / "runs"),
        pretrain_epochs=2,
        pretrain_batch=45,
        neighbours=5,
        epochs=2,
        self_epochs=2,
        batch=45,
        self_batch=45,
        lr=3e-3,
        heads=2,
        confidence=0.4,
        rotate=0.0,
        shear=0.0,
    )


@pytest.fixture
def no_report(monkeypatch) -> None:
    """t-SNE takes longer than the training of a small run."""
    monkeypatch.setattr(scan, "assignment_sections", lambda *_: [])
    monkeypatch.setattr(scan, "curves", lambda *_, **__: "")


def learner_of(config: Config) -> Learner:
    data = load(config, need_classes=False)
    return Learner(config, data, scan.embedder(config, data))


def test_neighbours_are_the_nearest_others_by_cosine(small: Config) -> None:
    learner = learner_of(dataclasses.replace(small, validation_neighbours=3))
    assert learner.neighbours.shape == (90, 5)
    assert learner.validation_neighbours.shape == (30, 3)
    for images, found in (
        (learner.data.x_train, learner.neighbours),
        (learner.data.x_test, learner.validation_neighbours),
    ):
        assert (found != torch.arange(len(images))[:, None]).all()
        z = F.normalize(learner.simclr.embeddings(images).double(), dim=1)
        similarity = (z @ z.T).fill_diagonal_(-2)
        kept = similarity.gather(1, found).amin(dim=1)
        assert (kept >= similarity.topk(found.shape[1]).values.amin(dim=1) - 1e-6).all()
    projected = learner_of(dataclasses.replace(small, mine="projection"))
    assert not torch.equal(projected.neighbours, learner.neighbours)


def test_the_head_with_the_lowest_validation_loss_is_kept(small: Config) -> None:
    learner = learner_of(small)
    with torch.no_grad():  # the first head gives all images one cluster, of which SCAN's loss is the greatest
        learner.wide.head.weight[:3] = 0
        learner.wide.head.bias[:3] = torch.tensor([9.0, 0.0, 0.0])
    first = learner.choose(1)
    assert torch.equal(learner.network.head.weight, learner.wide.head.weight[3:])
    assert torch.equal(learner.network.head.bias, learner.wide.head.bias[3:])
    p = learner.probabilities(learner.data.x_test).double()
    pairs = (p[:, None] * p[learner.validation_neighbours]).sum(dim=2)
    expected = -pairs.log().mean() - 5 * torch.special.entr(p.mean(dim=0)).sum()
    assert first["validation_loss"] == pytest.approx(float(expected), rel=1e-5)
    kept = learner.network.head.weight.clone()
    with torch.no_grad():
        learner.wide.head.weight.zero_()
        learner.wide.head.bias.copy_(torch.tensor([1.0, 0.0, 0.0]).repeat(2))
    resumed = learner_of(small)
    resumed.load_state(learner.state() | {"epoch": 1})
    for chooser in (learner, resumed):
        assert chooser.choose(2)["best_epoch"] == 1
        assert torch.equal(chooser.network.head.weight, kept)


def test_without_a_confident_image_self_labelling_changes_nothing(small: Config) -> None:
    learner = learner_of(dataclasses.replace(small, confidence=0.9999))
    learner.optimizer = learner.adam(learner.network, 0.01)
    before = {name: value.clone() for name, value in learner.network.state_dict().items()}
    assert learner.self_labelling_pass(Progress(0)) == {"loss": 0.0, "loss_self": 0.0, "confident": 0.0}
    for name, value in learner.network.state_dict().items():
        assert torch.equal(value, before[name])


def test_kmeans_is_a_network_whose_head_holds_the_centres(small: Config) -> None:
    learner = learner_of(dataclasses.replace(small, clustering="kmeans", kmeans_temperature=0.3))
    learner.kmeans()
    z = F.normalize(learner.simclr.embeddings(learner.data.x_train), dim=1)
    found = fastclust.kmeans(z, 3, n_init=20, spherical=True, seed=0)
    expected = (z @ found.centroids.T / 0.3).softmax(dim=1)
    torch.testing.assert_close(learner.probabilities(learner.data.x_train), expected)
    assert torch.equal(expected.argmax(dim=1), found.labels)


# ----------------------------------------------------------------------------------------------------------- whole runs


def final(run: Path) -> Tensor:
    return torch.cat([value.flatten().float() for value in load_checkpoint(run)["state"]["network"].values()])


def test_a_run_clusters_the_stripes_and_leaves_its_files(small: Config, tmp_path: Path, capsys) -> None:
    run = train(dataclasses.replace(small, pretrain_epochs=6, epochs=10, self_epochs=3))
    said = capsys.readouterr().out
    assert f"python -m methods.predict {run.path}" in said
    assert "warning" not in said
    result = json.loads((run.path / "result.json").read_text())
    assert result["acc"] > 90
    assert result["test_acc"] > 90
    assert result["used"] == 3
    assert result["neighbour_purity"] > 0.8
    assert {"train_nmi", "test_ari", "confidence"} <= result.keys()
    assert len((run.path / "metrics.jsonl").read_text().splitlines()) == 13
    report = (run.path / "report.html").read_text()
    for heading in ("SimCLR", "Training", "Confusion matrix", "Features"):
        assert f"<h2>{heading}</h2>" in report
    with np.load(run.path / "assignments.npz") as file:
        arrays = dict(file)
    assert arrays["probabilities"].shape == (120, 3)
    np.testing.assert_allclose(arrays["probabilities"].sum(axis=1), 1, atol=1e-5)
    assert arrays["embeddings"].shape == (120, 32)
    np.testing.assert_array_equal(arrays["labels"], arrays["probabilities"].argmax(axis=1))
    np.testing.assert_array_equal(arrays["split"], np.arange(120) >= 90)
    # The trained network gives the same clusters to the same images read from a file.
    np.savez(tmp_path / "new.npz", x=np.load(small.data.removeprefix("npz:"))["x_test"])
    rows = list(csv.DictReader(predict.predict(run.path, [tmp_path / "new.npz"], "cpu").splitlines()))
    assert [int(row["label"]) for row in rows] == arrays["labels"][90:].tolist()


def test_kmeans_leaves_a_run_like_any_other(small: Config, tmp_path: Path, no_report) -> None:
    run = train(dataclasses.replace(small, pretrain_epochs=6, clustering="kmeans"))
    result = json.loads((run.path / "result.json").read_text())
    assert result["acc"] > 60
    np.savez(tmp_path / "new.npz", x=np.load(small.data.removeprefix("npz:"))["x_test"])
    rows = list(csv.DictReader(predict.predict(run.path, [tmp_path / "new.npz"], "cpu").splitlines()))
    labels = np.load(run.path / "assignments.npz")["labels"]
    assert [int(row["label"]) for row in rows] == labels[90:].tolist()
    again = train(load_settings(run.path), run.path)
    assert torch.equal(final(again.path), final(run.path))


def load_settings(run: Path) -> Config:
    return Config(**json.loads((run / "config.json").read_text())["settings"])


@pytest.mark.parametrize("where", ["simclr", "clustering", "self-labelling"])
def test_a_resumed_run_ends_with_the_same_bits(
    small: Config, tmp_path: Path, monkeypatch, no_report, where: str
) -> None:
    whole = train(small)
    config = dataclasses.replace(small, runs=str(tmp_path / "cut"))
    owner, name, last = {
        "simclr": (SimCLR, "_pass", 2),
        "clustering": (Learner, "clustering_pass", 2),
        "self-labelling": (Learner, "self_labelling_pass", 2),
    }[where]
    plain, calls = getattr(owner, name), []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == last:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    (folder,) = (path for path in Path(config.runs).iterdir() if path.name != "simclr")
    torch.rand(5)  # a new process would not have its generators where the old one left them
    resumed = train(config, folder)
    assert torch.equal(final(resumed.path), final(whole.path))
    times = [[{k: v for k, v in row.items() if k != "seconds"} for row in run.history] for run in (whole, resumed)]
    assert times[0] == times[1]


@pytest.mark.parametrize("clustering", ["scan", "kmeans"])
def test_truth_is_for_the_report_alone(small: Config, tmp_path: Path, no_report, clustering: str) -> None:
    small = dataclasses.replace(small, clustering=clustering)
    with np.load(small.data.removeprefix("npz:")) as file:
        arrays = dict(file)
    seen = train(small)
    rng = np.random.default_rng(1)
    for part in ("y_train", "y_test"):
        arrays[part] = rng.permutation(arrays[part])
    np.savez(tmp_path / "shuffled.npz", **arrays)
    shuffled = train(dataclasses.replace(small, data=f"npz:{tmp_path / 'shuffled.npz'}"))
    assert torch.equal(final(seen.path), final(shuffled.path))
    assert seen.history[-1]["acc"] != shuffled.history[-1]["acc"]
    np.savez(tmp_path / "blind.npz", x_train=arrays["x_train"])
    blind = train(dataclasses.replace(small, data=f"npz:{tmp_path / 'blind.npz'}", clusters=3, validation="train"))
    assert "acc" not in blind.history[-1]
    assert not any("acc" in name for name in json.loads((blind.path / "result.json").read_text()))


def test_resnet18_takes_a_step_on_colour(small: Config, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3)).astype(np.uint8)
    np.savez(tmp_path / "colour.npz", x_train=images)
    config = dataclasses.replace(
        PRESETS["cifar10"], data=f"npz:{tmp_path / 'colour.npz'}", clusters=2, neighbours=3, runs=small.runs
    )
    learner = learner_of(config)
    assert learner.architecture["name"] == "resnet18"
    assert learner.validated is learner.data.x_train
    assert learner.simclr.loss(learner.data.x_train).isfinite()
    assert math.isfinite(learner.clustering_pass(Progress(0))["loss"])
    assert learner.choose(1)["best_epoch"] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--clusters", "1"], "--clusters must be 2"),
        (["--clusters", "95"], "90 training images are too few for 95 clusters"),
        (["--neighbours", "90"], "--neighbours 90 must be below the 90"),
        (["--batch", "1"], "--batch 1 must be 2"),
        (["--crop", "0"], "--crop 0.0"),
        (["--confidence", "1"], "--confidence 1.0"),
        (["--heads", "0"], "--heads 0"),
        (["--entropy-weight", "-1"], "--entropy-weight -1.0"),
        (["--pad", "8"], "--pad 8 must be below"),
        (["--subset-test", "31"], "--subset-test 31 is more than the 30 test images"),
        (["--network", "vgg"], "--network vgg is unknown"),
    ],
)
def test_settings_that_cannot_work_are_refused_first(write_stripes, refusal, arguments: list[str], words: str) -> None:
    assert words in refusal(scan, ["--data", f"npz:{write_stripes(90, 30)}", *arguments])


def test_no_classes_and_no_number_of_clusters_is_refused(tmp_path: Path, refusal) -> None:
    np.savez(tmp_path / "blind.npz", x_train=np.zeros((20, 8, 8), np.uint8))
    assert "--clusters must be 2 or more" in refusal(scan, ["--data", f"npz:{tmp_path / 'blind.npz'}"])
