"""RUC: its pieces against formulas written out, clean set, bases, calibration, attacks, whole runs."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastclust
from methods import predict, ruc, ruc_report
from methods.common import networks
from methods.common.attacks import bim, fgsm, under_attack
from methods.common.bases import Base
from methods.common.calibration import Judged, judge, reliability
from methods.common.errors import UserError
from methods.common.randaugment import RUC_OPERATIONS, rand_augment
from methods.common.run import load_checkpoint
from methods.ruc import Learner, clean_set, evenly, train
from methods.ruc_settings import PRESETS, Config, as_released

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def stripes(write_stripes) -> Path:
    return write_stripes(90, 30)


def wrong_in_part(path: Path, share: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """Soft assignments of the stripes' training images, some of them wrong and less sure; embeddings of the truth."""
    rng = np.random.default_rng(1)
    truth = np.load(path)["y_train"]
    wrong = rng.random(len(truth)) < share
    clusters = (2 - np.where(wrong, (truth + 1) % 3, truth)).astype(int)
    sure = np.where(wrong, 0.9, 0.999)[:, None]
    probabilities = np.where(np.eye(3)[clusters] > 0, sure, (1 - sure) / 2).astype(np.float32)
    return probabilities, (np.eye(3)[truth] + rng.normal(0, 0.1, (len(truth), 3))).astype(np.float32)


@pytest.fixture
def base(stripes: Path, tmp_path: Path) -> Path:
    probabilities, embeddings = wrong_in_part(stripes)
    path = tmp_path / "base.npz"
    np.savez(path, probabilities=probabilities, embeddings=embeddings)
    return path


@pytest.fixture
def small(stripes: Path, base: Path, tmp_path: Path) -> Config:
    """Settings of a run that takes a second."""
    return dataclasses.replace(
        PRESETS["digits"],
        data=f"npz:{stripes}",
        base=str(base),
        runs=str(tmp_path / "runs"),
        neighbours=5,
        epochs=2,
        tau2_every=1,
        batch=30,
        shift=0.0,
        rotate=0.0,
        scale=0.0,
        attacked=20,
        attacks=(0.05,),
        report=False,
    )


def distributions(n: int, c: int) -> Tensor:
    return torch.randn(n, c, dtype=torch.float64).softmax(dim=1)


# ---------------------------------------------------------------------------------------------------------- the pieces


def test_smoothing_is_eq_8() -> None:
    y = torch.eye(4, dtype=torch.float64)[[2, 0]]
    for epsilon in (0.5, 0.1):
        found = ruc.smoothed(y, epsilon)
        for i in range(2):
            for c in range(4):
                expected = (1 - epsilon) * y[i, c] + epsilon / 3 * (1 - y[i, c])
                assert float(found[i, c]) == pytest.approx(float(expected), rel=1e-14)
        torch.testing.assert_close(found.sum(dim=1), torch.ones(2, dtype=torch.float64))


def test_co_refinement_is_eqs_11_and_12() -> None:
    y, counter = torch.eye(3, dtype=torch.float64)[[0, 1, 2, 1, 0]], distributions(5, 3)
    found = ruc.co_refined(y, counter, temperature=0.5)
    confidence = [max(row) for row in counter.tolist()]
    for i in range(5):
        w = (confidence[i] - min(confidence)) / (max(confidence) - min(confidence))
        mix = [(1 - w) * float(y[i, c]) + w * float(counter[i, c]) for c in range(3)]
        expected = [value**2 / sum(v**2 for v in mix) for value in mix]
        assert found[i].tolist() == pytest.approx(expected, rel=1e-12)
    assert torch.equal(found[confidence.index(min(confidence))], y[confidence.index(min(confidence))])


def test_mixmatch_mixes_each_with_another_and_itself_outweighs(monkeypatch: pytest.MonkeyPatch) -> None:
    images, targets = torch.rand(7, 1, 4, 4, dtype=torch.float64), distributions(7, 3)
    shares, other = torch.tensor([0.1, 0.5, 0.8, 0.3, 1.0, 0.0, 0.6], dtype=torch.float64), torch.randperm(7)
    monkeypatch.setattr(torch.distributions.Beta, "sample", lambda self: shares)
    monkeypatch.setattr(torch, "randperm", lambda n, device: other)
    found_images, found_targets = ruc.mixmatch(images, targets, 4.0)
    for i in range(7):
        share = max(float(shares[i]), 1 - float(shares[i]))
        for found, given in ((found_images, images), (found_targets, targets)):
            torch.testing.assert_close(found[i], share * given[i] + (1 - share) * given[other[i]])


def test_mixing_draws_from_beta() -> None:
    images = torch.zeros(4000, 1, 1, 1)
    images[::2] = 1
    share = ruc.mixmatch(images, torch.ones(4000, 1), 4.0)[0].flatten()
    share = share[(share > 0) & (share < 1)]
    share = torch.maximum(share, 1 - share)
    # E max(λ, 1 - λ) for Beta(4, 4) is 1/2 + 35/256.
    assert float(share.mean()) == pytest.approx(0.5 + 35 / 256, abs=0.01)


def test_losses_are_eqs_6_and_7() -> None:
    targets, logits = distributions(6, 4), torch.randn(6, 4, dtype=torch.float64)
    p = logits.softmax(dim=1)
    entropy = -sum(float(targets[i, c] * p[i, c].log()) for i in range(6) for c in range(4)) / 6
    squares = sum(float((targets[i, c] - p[i, c]) ** 2) for i in range(6) for c in range(4))
    assert float(ruc.cross_entropy(targets, logits)) == pytest.approx(entropy, rel=1e-12)
    assert float(ruc.squared_error(targets, logits, "mean")) == pytest.approx(squares / 24, rel=1e-12)
    assert float(ruc.squared_error(targets, logits, "sum")) == pytest.approx(squares / 6, rel=1e-12)


def test_the_surer_network_refurbishes_above_tau2() -> None:
    first = torch.tensor([[0.95, 0.05], [0.2, 0.8], [0.05, 0.95], [0.99, 0.01]])
    second = torch.tensor([[0.01, 0.99], [0.3, 0.7], [0.93, 0.07], [0.99, 0.01]])
    labels, clean = torch.tensor([0, 0, 0, 1]), torch.tensor([False, False, False, True])
    labels, clean = ruc.co_refurbish(labels, clean, [first, second], 0.9)
    assert labels.tolist() == [1, 0, 1, 1]  # a clean image keeps its label
    assert clean.tolist() == [True, False, True, True]


def test_schedules() -> None:
    paper = Config()
    assert [ruc.tau2(paper, epoch) for epoch in (1, 40, 41, 200)] == pytest.approx([0.9, 0.9, 0.92, 0.98])
    assert [ruc.ramp(share, 0.0) for share in (0, 0.25, 1)] == [0, 0.25, 1]
    assert ruc.ramp(0.02, 0.1) == 0.1
    released = as_released(Config(data="cifar10"))
    assert ruc.tau2(released, 200) == 0.99
    assert (released.batch, released.refurbish, released.ramp_floor, released.crop) == (250, "batch", 0.1, 0.2)


def test_a_fixed_magnitude_goes_so_far_and_no_further() -> None:
    images = torch.full((600, 1, 8, 8), 0.5)
    dark = {"brightness": RUC_OPERATIONS["brightness"]}
    torch.testing.assert_close(rand_augment(images, 1, dark, 2.0), torch.full_like(images, 0.5 * (0.99 - 0.98 * 0.2)))
    assert rand_augment(images, 1, dark, 0.0).std() > 0.1
    moved = rand_augment(images, 1, {"translate_x": RUC_OPERATIONS["translate_x"]}, 10.0)
    assert {tuple(row.tolist()) for row in (moved[:, 0, 0] > 0)} == {
        (True,) * 6 + (False,) * 2,
        (False,) * 2 + (True,) * 6,
    }


def test_balanced_batches_hold_each_label_as_often() -> None:
    torch.manual_seed(0)
    labels = torch.tensor([0] * 5 + [1] * 90 + [2] * 5)  # of all images; those of label 2 are not among the drawn
    batches = evenly(torch.arange(95), n_batches=40, batch=50, labels=labels)
    assert [len(batch) for batch in batches] == [50] * 40
    drawn = torch.cat(batches)
    counts = torch.bincount(labels[drawn], minlength=3).tolist()
    assert counts[2] == 0
    assert abs(counts[0] - 1000) < 100  # 1000 is the mean, its deviation 22
    assert len(drawn.unique()) == 95


# -------------------------------------------------------------------------------------------------------- the clean set


def test_the_three_strategies(small: Config) -> None:
    labels, sure = [0, 0, 0, 0, 1, 1, 1, 1], [0.995, 0.995, 0.6, 0.995, 0.996, 0.6, 0.992, 0.997]
    probabilities = torch.tensor(
        [[p, 1 - p] if label == 0 else [1 - p, p] for label, p in zip(labels, sure, strict=True)]
    )
    angle = torch.tensor([0.0, 0.05, 0.1, 0.15, 1.5, 1.45, 1.4, 0.08])  # the last lies in the other cluster
    base = Base(probabilities, 7 * torch.stack([angle.cos(), angle.sin()], dim=1))

    def found(strategy: str) -> list[int]:
        config = dataclasses.replace(small, strategy=strategy, neighbours=2)
        return clean_set(config, base, torch.device("cpu")).nonzero().flatten().tolist()

    assert found("confidence") == [0, 1, 3, 4, 6, 7]
    assert found("metric") == [0, 1, 2, 3, 4, 5, 6]  # where the two neighbours differ, the lower label counts
    assert found("hybrid") == [0, 1, 3, 4, 6]


@pytest.mark.parametrize("strategy", ["metric", "hybrid"])
def test_a_cluster_among_others_is_refused_with_the_strategy_that_would_take_it(small: Config, strategy: str) -> None:
    probabilities = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.05, 0.95], [0.9, 0.1]])
    base = Base(probabilities, torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.05], [1.0, 0.2]]))
    config = dataclasses.replace(small, strategy=strategy, neighbours=2, tau1=0.8)
    with pytest.raises(UserError, match=r"no image of the clusters \[1\]: take --strategy confidence, or lower"):
        clean_set(config, base, torch.device("cpu"))
    with pytest.raises(UserError, match=": lower --"):  # nor would that one
        clean_set(
            dataclasses.replace(config, tau1=0.99), base._replace(probabilities=probabilities), torch.device("cpu")
        )


def test_quality_of_a_clean_set() -> None:
    base = Base(torch.eye(2)[[1, 1, 1, 0, 0, 0]])
    truth = torch.tensor([0, 0, 1, 1, 1, -1])
    clean = torch.tensor([True, False, True, True, False, True])
    found = ruc_report.quality(clean, torch.tensor([1, 1, 1, 0, 0, 0]), truth, base)
    assert found["clean_precision"] == pytest.approx(200 / 3)  # images 0 and 3 of 0, 2, 3
    assert found["clean_recall"] == pytest.approx(50)  # of 0, 1, 3, 4
    assert found["clean_f1"] == pytest.approx(2 * (200 / 3) * 50 / (200 / 3 + 50))
    assert ruc_report.quality(clean, truth, torch.full((6,), -1), base) == {}


# ---------------------------------------------------------------------------------------------- calibration and attacks


def test_calibration_error_of_a_case_made_by_hand() -> None:
    confidence = torch.tensor([0.05, 0.95, 0.97, 0.95, 0.5], dtype=torch.float64)
    right = torch.tensor([False, True, True, False, True])
    bins = reliability(Judged(confidence, right))
    assert bins.count.sum() == 5
    assert bins.count[14] == 3
    assert float(bins.accuracy[14]) == pytest.approx(2 / 3)
    expected = (0.05 + 3 * abs(2 / 3 - (0.95 + 0.97 + 0.95) / 3) + 0.5) / 5
    assert bins.error == pytest.approx(expected)


def test_calibration_error_is_the_metrics_where_clusters_are_classes() -> None:
    p, truth = distributions(300, 4), torch.randint(4, (300,))
    truth[:200] = p[:200].argmax(dim=1)
    expected = fastclust.metrics.expected_calibration_error(p, truth)
    assert reliability(judge(p, truth)).error == pytest.approx(expected, rel=1e-9)
    turned = p[:, [2, 0, 3, 1]]  # the numbers of clusters do not matter
    assert reliability(judge(turned, truth)).error == pytest.approx(expected, rel=1e-9)


class Linear(nn.Module):
    """Two classes told apart by the sum of pixels under fixed weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.tensor([3.0, -2.0, 0.0, 1.0])

    def forward(self, images: Tensor) -> Tensor:
        score = images.flatten(1) @ self.weight
        return torch.stack([score, -score], dim=1)


def test_attacks_go_against_the_right_class() -> None:
    network, images = Linear(), torch.tensor([0.5, 0.02, 0.5, 0.5]).reshape(1, 1, 2, 2)
    for attack in (fgsm, bim):
        found = attack(network, images, torch.tensor([0]), 0.1).flatten().tolist()
        assert found == pytest.approx([0.4, 0.12, 0.5, 0.4])  # class 0 falls with the weights' signs
        found = attack(network, images, torch.tensor([1]), 0.1).flatten().tolist()
        assert found == pytest.approx([0.6, 0.0, 0.5, 0.6])  # pixels stay in [0, 1]


def test_attacks_reach_a_network_however_sure_it_is() -> None:
    network = Linear()
    network.weight = network.weight * 30  # the softmax is 1 in float32
    images = torch.tensor([0.9, 0.1, 0.5, 0.9]).reshape(1, 1, 2, 2)
    assert not torch.equal(fgsm(network, images, torch.tensor([0]), 0.1), images)


def test_bim_stays_within_epsilon_and_is_no_weaker() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 3)).eval()
    images = torch.randint(256, (200, 1, 4, 4), dtype=torch.uint8)
    truth = network(images / 255).argmax(dim=1)
    assert ((bim(network, images / 255, truth, 0.05) - images / 255).abs() <= 0.05 + 1e-6).all()
    found = under_attack(network, images, truth, (0.0, 0.05, 0.1))
    assert found["fgsm"][0] == found["bim"][0] == 100
    assert found["bim"][2] <= found["fgsm"][2] < 80


# ----------------------------------------------------------------------------------------------------------- whole runs


def test_a_run_mends_its_base_and_leaves_its_files(small: Config, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(ruc_report, "embedding", lambda *arguments: "")  # t-SNE takes longer than all else
    config = dataclasses.replace(small, epochs=6, lr=0.03, report=True)
    run = train(config)
    result = json.loads((run.path / "result.json").read_text())
    assert result["base_train_acc"] < 90
    assert "base_acc" not in result  # the base knows no test images
    assert result["train_acc"] > 95
    assert result["test_acc"] > 95
    assert result["best_acc"] >= result["train_acc"]
    assert result["start_clean_precision"] > 95
    assert result["ece"] >= 0
    assert {"fgsm_0.05", "bim_0.05", "clean_f1", "nmi", "ari", "base_train_ece"} <= result.keys()
    report = (run.path / "report.html").read_text()
    for heading in (
        "Clean set",
        "Confidence",
        "Calibration",
        "Under attack",
        "Features",
        "Confusion matrix of the base",
    ):
        assert f"<h2>{heading}" in report
    with np.load(run.path / "assignments.npz") as file:
        arrays = dict(file)
    assert arrays["probabilities"].shape == (120, 3)
    assert arrays["embeddings"].shape == (120, 64)
    np.testing.assert_allclose(arrays["probabilities"].sum(axis=1), 1, atol=1e-5)
    # Both networks together give the same answers from the run's folder.
    np.savez(tmp_path / "new.npz", x=np.load(config.data.removeprefix("npz:"))["x_test"])
    rows = list(csv.DictReader(predict.predict(run.path, [tmp_path / "new.npz"], "cpu").splitlines()))
    assert [int(row["label"]) for row in rows] == arrays["labels"][90:].tolist()
    assert [float(row["confidence"]) for row in rows] == pytest.approx(
        arrays["probabilities"][90:].max(axis=1).tolist(), abs=1e-4
    )
    # And its folder is a base itself, of all images, whose backbone is not taken, for it is of two networks.
    again, found, n_train = ruc.load_with_base(dataclasses.replace(config, base=str(run.path), part="all"))
    assert len(again.x_train) == 120
    assert n_train == 90
    assert isinstance(found.network, networks.Ensemble)


@pytest.mark.parametrize("balance", [False, True])
def test_shuffled_truth_leaves_the_same_weights(small: Config, stripes: Path, tmp_path: Path, balance: bool) -> None:
    small = dataclasses.replace(small, balance=balance)
    with np.load(stripes) as file:
        arrays = dict(file)
    rng = np.random.default_rng(3)
    for name in ("y_train", "y_test"):
        arrays[name] = rng.permutation(arrays[name])
    np.savez(tmp_path / "shuffled.npz", **arrays)
    seen, shuffled = train(small), train(dataclasses.replace(small, data=f"npz:{tmp_path / 'shuffled.npz'}"))
    assert seen.history[-1]["clean_precision"] > shuffled.history[-1]["clean_precision"] + 10
    seen, shuffled = load_checkpoint(seen.path), load_checkpoint(shuffled.path)
    for part in ("network", "labels", "clean"):
        first, second = seen["state"][part], shuffled["state"][part]
        pairs = zip(first.values(), second.values(), strict=True) if part == "network" else [(first, second)]
        assert all(torch.equal(a, b) for a, b in pairs), part


def test_a_resumed_run_ends_with_the_same_bits(small: Config, monkeypatch) -> None:
    config = dataclasses.replace(small, compat="released", pad=0, cutout=0, epochs=3)
    monkeypatch.setattr(ruc, "as_released", lambda config: dataclasses.replace(as_released(config), batch=30, cutout=2))
    whole = train(config)
    calls = []
    original = Learner.epoch

    def stop_in_the_third(self: Learner, *arguments: object) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(Learner, "epoch", stop_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    (begun,) = [f.parent for f in Path(small.runs).glob("*/checkpoint.pt") if not (f.parent / "result.json").exists()]
    resumed = train(config, begun)
    first, second = load_checkpoint(whole.path)["state"], load_checkpoint(resumed.path)["state"]
    assert all(torch.equal(value, second["network"][name]) for name, value in first["network"].items())
    assert torch.equal(first["clean"], second["clean"])
    assert {k: v for k, v in whole.history[-1].items() if k != "seconds"} == {
        k: v for k, v in resumed.history[-1].items() if k != "seconds"
    }


def test_settled_statistics_are_those_of_the_images(stripes: Path) -> None:
    """In evaluation mode a network then answers as in training mode on all images at once; no draw is made."""
    images = torch.from_numpy(np.load(stripes)["x_train"])
    images = images[images.flatten(start_dim=1).float().mean(dim=1).argsort()].reshape(
        len(images), 1, *images.shape[-2:]
    )
    shape = {"image_size": tuple(images.shape[-2:]), "n_outputs": 3, "weight_norm": False, "unit_length": False}
    network, rng = networks.build("cnn-flat", n_channels=1, **shape), torch.get_rng_state()
    network.standardise.set(torch.tensor([0.3]), torch.tensor([0.3]))
    with torch.no_grad():
        expected = network.train()(images.float() / 255)
        before = network.eval()(images.float() / 255)
        ruc.settle_statistics(network, images, batch=len(images))
        after = network.eval()(images.float() / 255)
        ruc.settle_statistics(network, images, batch=10)
        in_batches = network.eval()(images.float() / 255)
    far = (before - expected).abs().mean()
    assert (after - expected).abs().mean() < 0.05 * far  # the variance is divided by N - 1 here, by N there
    assert (in_batches - expected).abs().mean() < 0.3 * far
    assert torch.equal(rng, torch.get_rng_state())
    assert {layer.momentum for layer in network.modules() if hasattr(layer, "momentum")} == {0.1}


@pytest.mark.parametrize("settle", [True, False])
def test_networks_settle_after_each_pass_if_asked(small: Config, settle: bool, monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(ruc, "settle_statistics", lambda *arguments: calls.append(arguments))
    train(dataclasses.replace(small, settle=settle, attacked=0))
    assert len(calls) == (4 if settle else 0)  # two networks, two epochs


@pytest.mark.parametrize(
    ("variant", "n_networks", "strong"),
    [("full", 2, True), ("no-co-training", 1, True), ("no-label-smoothing", 2, False), ("mixmatch", 1, False)],
)
def test_the_ablations_leave_their_part_out(small: Config, variant: str, n_networks: int, strong: bool) -> None:
    run = train(dataclasses.replace(small, variant=variant, epochs=1, base="kmeans", strategy="metric", attacked=0))
    state = load_checkpoint(run.path)["state"]
    assert len(state["optimizers"]) == n_networks
    assert state["architecture"].get("members", 1) == n_networks
    assert ("loss_strong" in run.history[0]) is strong


def test_a_run_gives_its_backbone_and_its_choice_of_images(small: Config, monkeypatch) -> None:
    from methods import bsc_ic

    monkeypatch.setattr(bsc_ic, "curves", lambda *arguments, **options: "")
    monkeypatch.setattr(bsc_ic, "assignment_sections", lambda *arguments: [])
    before = dataclasses.replace(
        bsc_ic.PRESETS["digits"], data=small.data, runs=small.runs, epochs=1, starts=1, batch=40, subset=60, seed=4
    )
    folder = bsc_ic.train(before).path
    with np.load(folder / "assignments.npz") as file:  # one epoch leaves no clean set: only its network matters here
        arrays = dict(file) | {"probabilities": np.full((len(file["labels"]), 3), 0.001, np.float32)}
    arrays["probabilities"][np.arange(90), np.arange(90) % 3] = 0.998
    np.savez(folder / "assignments.npz", **arrays)
    config = dataclasses.replace(small, base=str(folder), strategy="confidence")
    data, base, n_train = ruc.load_with_base(dataclasses.replace(config, part="all"))
    assert (len(data.x_train), n_train) == (90, 60)
    assert base.network is not None
    learner = Learner(config, data.x_train, data.pixel_statistics(), base, torch.ones(90, dtype=torch.bool))
    for network in learner.networks:
        pairs = zip(network.body.parameters(), base.network.body.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    heads = [network.head.weight for network in (*learner.networks, base.network)]
    assert not torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    config_of_head, clean = dataclasses.replace(config, head="base"), torch.ones(90, dtype=torch.bool)
    learner = Learner(config_of_head, data.x_train, data.pixel_statistics(), base, clean)
    torch.testing.assert_close(learner.assignments(), learner.predict(base.network))  # it starts where the base ended
    assert learner.networks[0].head.weight is not learner.networks[1].head.weight
    with pytest.raises(UserError, match="--data"):
        ruc.load_with_base(dataclasses.replace(config, data="digits"))
    with pytest.raises(UserError, match="--subset 60"):
        ruc.load_with_base(dataclasses.replace(config, subset=30))


def test_two_networks_answer_by_the_mean_of_their_probabilities() -> None:
    shape = {"n_channels": 1, "image_size": (8, 8), "n_outputs": 3, "weight_norm": False}
    both, images = networks.build("cnn-small", **shape, members=2).eval(), torch.rand(5, 1, 8, 8)
    expected = torch.stack([member(images).softmax(dim=1) for member in both.members]).mean(dim=0)
    torch.testing.assert_close(both(images).softmax(dim=1), expected)
    torch.testing.assert_close(both(images).exp(), expected)


# --------------------------------------------------------------------------------------------------------------- errors


def spoilt(arrays: dict[str, np.ndarray], how: str) -> dict[str, np.ndarray]:
    p = arrays["probabilities"]
    if how == "rows":
        return {name: array[:50] for name, array in arrays.items()}
    if how == "logits":
        return arrays | {"probabilities": np.log(p)}
    if how == "nan":
        p = p.copy()
        p[7, 1] = np.nan
        return arrays | {"probabilities": p}
    if how == "empty":
        return arrays | {"probabilities": np.concatenate([p, np.zeros((len(p), 1), np.float32)], axis=1)}
    if how == "no embeddings":
        return {"probabilities": p}
    if how == "embeddings":
        return arrays | {"embeddings": arrays["embeddings"][:-1]}
    if how == "name":
        return {"p": p}
    doubtful = p.argmax(axis=1) == 1
    return arrays | {"probabilities": np.where(doubtful[:, None], 0.5 * p + 0.5 / 3, p)}  # "doubtful"


@pytest.mark.parametrize(
    ("how", "changes", "words"),
    [
        ("rows", {}, "holds 50 rows, the data 90 training images"),
        ("logits", {}, "90 rows do not, first 0"),
        ("nan", {}, "1 rows that are not finite, first at 7"),
        ("empty", {}, "1 of 4 clusters are empty .3."),
        ("no embeddings", {}, "--strategy confidence"),
        ("embeddings", {}, "embeddings holds 89 rows, probabilities 90"),
        ("name", {}, "lacks the array probabilities"),
        ("doubtful", {}, "no image of the clusters .1.: take --strategy metric, or lower --tau1"),
        ("doubtful", {"strategy": "confidence"}, "no image of the clusters .1.: lower --tau1"),
        ("", {"tau1": 1.0, "strategy": "confidence"}, "the clean set is empty: lower --tau1"),
        ("", {"neighbours": 90}, "--neighbours 90"),
        ("", {"base": "nowhere"}, "nowhere: no such file"),
        ("", {"epsilon": 1.5}, "--epsilon 1.5"),
        ("", {"views": 0}, "--views 0"),
        ("", {"part": "all"}, "--part all"),
        ("", {"base": "kmeans", "clusters": 1}, "--clusters must be 2 or more"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    small: Config, base: Path, how: str, changes: dict, words: str
) -> None:
    if how:
        np.savez(base, **spoilt(dict(np.load(base)), how))
    with pytest.raises(UserError, match=words) as refused:
        train(dataclasses.replace(small, **changes))
    assert "\n" not in str(refused.value)
    assert not Path(small.runs).exists()


def test_the_command_line(refusal) -> None:
    assert "no such file" in refusal(ruc, ["--base", "nowhere.npz"])
