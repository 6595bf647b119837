"""ClusterNet: centres, λ and losses against their equations, the kept autoencoder, whole runs, a user's errors."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastclust import reference
from methods import clusternet, predict
from methods.clusternet import PRESETS, Config, Learner, choose_given, moved_centres, ramp, train
from methods.common import autoencoder
from methods.common.autoencoder import reconstruction_loss
from methods.common.data import choose_percent
from methods.common.errors import UserError
from methods.common.pretraining import Pretraining
from methods.common.run import load_checkpoint
from methods.common.sources import load

pytestmark = pytest.mark.usefixtures("one_thread")


class NoProgress:
    def step(self, title: str) -> None:
        pass

    def epoch(self, title: str, figures: dict[str, str]) -> None:
        pass


@pytest.fixture
def stripes(write_stripes) -> Path:
    return write_stripes(90, 30)


@pytest.fixture
def small(stripes: Path, tmp_path: Path) -> Config:
    """Settings of a run that takes a second or two."""
    return dataclasses.replace(
        PRESETS["paper"],
        data=f"npz:{stripes}",
        percent=0.0,
        holdout=0.0,
        labels=9,
        strides=(2, 2, 1),
        runs=str(tmp_path / "runs"),
        pretrain_epochs=2,
        epochs=3,
        lambda_start=1,
        lambda_end=3,
        batch=30,
    )


def learner_of(config: Config) -> Learner:
    data = load(dataclasses.replace(config, seed=config.split_seed))
    return Learner(config, data, choose_given(config, data))


# -------------------------------------------------------------------------------------------------- steps and equations


def test_centres_move_as_if_each_point_came_alone() -> None:
    centres, counts = torch.randn(4, 3, dtype=torch.float64), torch.tensor([100.0, 7.0, 1.0, 250.0]).double()
    z, clusters = torch.randn(50, 3, dtype=torch.float64), torch.randint(3, (50,))  # none in the last cluster
    expected, seen = centres.clone(), counts.clone()
    for point, k in zip(z, clusters.tolist(), strict=True):
        seen[k] += 1
        expected[k] -= (expected[k] - point) / seen[k]
    moved, counted = moved_centres(centres, counts, z, clusters)
    torch.testing.assert_close(moved, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(counted, seen)
    assert torch.equal(moved[3], centres[3])


@pytest.mark.parametrize(("epoch", "weight"), [(1, 0), (4, 0), (5, 0), (12, 0.2), (33, 0.8), (40, 1), (60, 1)])
def test_lambda_is_equation_17(epoch: int, weight: float) -> None:
    config = Config()
    assert (config.lambda_start, config.lambda_end) == (5, 40)
    assert ramp(epoch, config) == pytest.approx(weight)
    assert ramp(epoch, dataclasses.replace(config, lambda_start=0, lambda_end=0, lambda_max=0.3)) == 0.3


def test_centres_start_at_the_means_of_the_labelled_features(small: Config) -> None:
    learner = learner_of(dataclasses.replace(small, least_count=2))
    learner.start()
    z = learner.features(learner.data.x_train)
    for label in range(3):
        torch.testing.assert_close(learner.network.centres[label], z[learner.given == label].mean(dim=0))
    assert learner.network.counts.tolist() == [3, 3, 3]
    learner = learner_of(small)
    learner.start()
    assert learner.network.counts.tolist() == [100, 100, 100]


@pytest.mark.parametrize(
    ("settings", "weight"),
    [
        ({}, 0.4),
        ({}, 0.0),
        ({"reconstruction": "mean", "reconstruction_weight": 0.3, "margin": 0.5, "cluster_weight": 0.0}, 1.0),
    ],
)
def test_a_step_is_equation_3(small: Config, settings: dict, weight: float) -> None:
    config = dataclasses.replace(small, dropout=0.0, lr=1e-30, **settings)
    learner = learner_of(config)
    learner.start()
    learner.network.counts.fill_(5)
    centres = learner.network.centres.double()
    part, rest = learner.labelled, learner.unlabelled[:40]
    images = learner.data.x_train[torch.cat([part, rest])].float() / 255
    z = learner.network.features(images).detach()
    recon = (learner.network.decode(z) - images).square().flatten(1)
    recon = (recon.sum(1) if config.reconstruction == "sum" else recon.mean(1)).mean()
    z = z.double()
    nearest = (z[9:, None] - centres).square().sum(2).argmin(1)
    expected = config.reconstruction_weight * recon
    for points, clusters, share in ((z[:9], learner.given[part], 1.0), (z[9:], nearest, weight)):
        log_p = reference.soft_assign(points, centres)
        pair = reference.pairwise_kl(log_p, clusters, config.margin, True)
        spread = (points - centres[clusters]).square().sum(1).mean()
        expected = expected + share * (pair + config.cluster_weight * spread)
    terms = learner.step(part, rest, learner.given, weight)
    assert float(terms["loss"]) == pytest.approx(float(expected.detach()), rel=1e-4)

    moved, counts = moved_centres(centres, torch.full((3,), 5.0).double(), z[:9], learner.given[part])
    if weight:
        moved, _ = moved_centres(moved, counts, z[9:], nearest)
    torch.testing.assert_close(learner.network.centres.double(), moved, rtol=1e-5, atol=1e-5)


def test_no_pair_joins_a_labelled_and_an_unlabelled_point(small: Config, monkeypatch) -> None:
    learner = learner_of(small)
    learner.start()
    batches: list[torch.Tensor] = []
    plain = clusternet.fastclust.pairwise_kl

    def seen(log_p: torch.Tensor, labels: torch.Tensor, **options) -> torch.Tensor:
        assert options == {"margin": 2.0, "detach_target": True}
        batches.append(labels)
        return plain(log_p, labels, **options)

    monkeypatch.setattr(clusternet.fastclust, "pairwise_kl", seen)
    learner.step(learner.labelled, learner.unlabelled[:20], learner.given, 1.0)
    assert [len(labels) for labels in batches] == [9, 20]
    assert torch.equal(batches[0], learner.given[learner.labelled])


def test_gradients_stop_at_the_first_argument_and_at_the_centres(small: Config) -> None:
    learner = learner_of(small)
    learner.start()
    z = (torch.rand(2, 32) * 0.2).requires_grad_()
    log_p = F.log_softmax(-torch.cdist(z, learner.network.centres).square(), dim=1)
    pair, _ = learner.clustering_losses(z, log_p, torch.tensor([1, 1]))
    (ours,) = torch.autograd.grad(pair, z, retain_graph=True)
    fixed = log_p.detach()
    by_hand = (fixed[0].exp() * (fixed[0] - log_p[1])).sum() + (fixed[1].exp() * (fixed[1] - log_p[0])).sum()
    (expected,) = torch.autograd.grad(by_hand, z)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
    assert not learner.network.centres.requires_grad


def test_many_labels_come_in_batches_with_as_many_of_each_class(small: Config) -> None:
    learner = learner_of(dataclasses.replace(small, labels=30, batch_labelled=12))
    for batch in learner.labelled_batches():
        assert torch.bincount(learner.given[batch], minlength=3).tolist() == [4, 4, 4]
    assert len(torch.cat(learner.labelled_batches()).unique()) > 12
    learner = learner_of(dataclasses.replace(small, labels=30, batch_labelled=3))
    assert {len(batch) for batch in learner.labelled_batches()} == {6}, "two of each class make the least pairs"
    learner = learner_of(dataclasses.replace(small, labels=30, batch_labelled=30))
    assert all(torch.equal(batch, learner.labelled) for batch in learner.labelled_batches())


def test_a_share_of_each_class_is_labelled(small: Config) -> None:
    classes = torch.cat([torch.zeros(200), torch.ones(6), torch.full((50,), -1.0)]).long()
    chosen = choose_percent(classes, 5.0, 2, 0, least=2)
    assert torch.bincount(classes[chosen]).tolist() == [10, 2]
    assert not torch.equal(chosen, choose_percent(classes, 5.0, 2, 1, least=2))


# ---------------------------------------------------------------------------------------------------------- the network


@pytest.mark.parametrize(("size", "strides"), [((16, 16), (2, 2, 2)), ((28, 28), (2, 2, 2)), ((9, 14), (2, 2, 1))])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_decoder_gives_back_any_size(size: tuple[int, int], strides: tuple[int, int, int], channels: int) -> None:
    network = autoencoder.ClusterAutoencoder(
        channels, size, 7, n_features=32, strides=strides, dropout=0.1, drop_features=True
    )
    images = torch.rand(5, channels, *size)
    z = network.features(images)
    assert z.shape == (5, 32)
    assert z.abs().max() <= 1 / 0.9 + 1e-6, "tanh, and what dropout scales it by"
    assert network.decode(z).shape == images.shape
    assert network.eval()(images).shape == (5, 7)
    assert network(images[:0]).shape == (0, 7)
    torch.testing.assert_close(network(images).exp().sum(1), torch.ones(5))
    convs = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)]
    assert [conv.out_channels for conv in convs] == [32, 64, 128, 64, 32, channels]
    assert convs[-1] is network.decoder[-1], "the last layer is linear"
    assert sum(isinstance(layer, nn.Dropout) for layer in network.modules()) == 3 + 1 + 1 + 2


def test_a_single_pixel_has_no_norm() -> None:
    with pytest.raises(UserError, match="leave a single pixel of 8 x 8"):
        autoencoder.ClusterAutoencoder(1, (8, 8), 7, n_features=4, strides=(2, 2, 2), dropout=0, drop_features=True)


def test_reconstruction_loss_is_a_sum_over_pixels() -> None:
    images, decoded = torch.zeros(4, 1, 5, 5), torch.full((4, 1, 5, 5), 2.0)
    assert reconstruction_loss(decoded, images) == 100
    assert reconstruction_loss(decoded, images, "mean") == 4


# ------------------------------------------------------------------------------------------------- the kept autoencoder


def weights(network: nn.Module) -> torch.Tensor:
    return torch.cat([value.flatten().float() for value in network.state_dict().values()])


def pretrained(config: Config) -> tuple[Pretraining, torch.Tensor]:
    learner = learner_of(config)
    pretraining = learner.pretraining()
    pretraining.train(NoProgress())
    return pretraining, weights(learner.network)


def test_the_autoencoder_is_trained_once(small: Config, monkeypatch) -> None:
    first, trained = pretrained(small)
    assert first.losses[1] < first.losses[0]
    with monkeypatch.context() as never:
        never.setattr(Pretraining, "_pass", lambda *_: pytest.fail("trained again"))
        for other in ({"seed": 3}, {"labels": 12}, {"lr": 0.1}, {"drop_features": not small.drop_features}):
            again, taken = pretrained(dataclasses.replace(small, **other))
            assert torch.equal(taken, trained)
            assert again.done_steps == again.total_steps
    for other in ({"split_seed": 1}, {"pretrain_lr": 1e-3}, {"pretrain_epochs": 1}, {"strides": (2, 1, 1)}):
        assert pretrained(dataclasses.replace(small, **other))[0].finished != first.finished
    path = Path(small.data.removeprefix("npz:"))
    arrays = dict(np.load(path))
    arrays["x_train"][0, 0, 0] += 1
    np.savez(path, **arrays)
    assert pretrained(small)[0].finished != first.finished
    assert len(list(first.finished.parent.iterdir())) == 6, "a finished one leaves nothing begun"


def test_a_begun_autoencoder_is_gone_on_with(small: Config, tmp_path: Path, monkeypatch) -> None:
    small = dataclasses.replace(small, pretrain_epochs=4)
    _, whole = pretrained(dataclasses.replace(small, cache=str(tmp_path / "elsewhere")))
    plain, passes = Pretraining._pass, []

    def interrupted(*arguments) -> float:
        passes.append(1)
        if len(passes) == 3:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(Pretraining, "_pass", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pretrained(small)
    torch.rand(5)
    _, resumed = pretrained(small)
    assert torch.equal(resumed, whole)
    assert len(passes) == 3 + 2


# ----------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def no_report(monkeypatch) -> None:
    """t-SNE takes longer than the training of a small run."""
    monkeypatch.setattr(clusternet, "write_results", lambda *_: None)


def without_times(history: list[dict]) -> list[dict]:
    return [{key: value for key, value in metrics.items() if key != "seconds"} for metrics in history]


def final(run: Path) -> torch.Tensor:
    return torch.cat([value.flatten().float() for value in load_checkpoint(run)["state"]["network"].values()])


@pytest.mark.parametrize("where", ["in the pre-training", "after two epochs"])
def test_a_resumed_run_is_the_same_bit_for_bit(
    small: Config, tmp_path: Path, monkeypatch, no_report, where: str
) -> None:
    whole = train(small)
    config = dataclasses.replace(small, runs=str(tmp_path / "cut"))
    calls = []

    def cut(plain, after: int):
        def interrupted(*arguments):
            calls.append(1)
            if len(calls) == after:
                raise KeyboardInterrupt
            return plain(*arguments)

        return interrupted

    if where == "in the pre-training":
        monkeypatch.setattr(Pretraining, "_pass", cut(Pretraining._pass, 2))
    else:
        monkeypatch.setattr(Learner, "clustering_pass", cut(Learner.clustering_pass, 3))
    with pytest.raises(KeyboardInterrupt):
        train(config)
    (folder,) = (path for path in Path(config.runs).iterdir() if path.name != "autoencoders")
    torch.rand(5)  # a new process would not have its generators where the old one left them
    resumed = train(config, folder)
    assert torch.equal(final(resumed.path), final(whole.path))
    assert without_times(resumed.history) == without_times(whole.history)
    states = [load_checkpoint(run.path)["state"] for run in (whole, resumed)]
    assert states[0]["start_figures"] == states[1]["start_figures"]
    assert torch.equal(states[0]["start_features"], states[1]["start_features"])


def test_the_folder_a_run_leaves_and_predictions_from_it(small: Config, stripes: Path, capsys) -> None:
    run = train(small)
    assert f"python -m methods.predict {run.path}" in capsys.readouterr().out
    assert len((run.path / "metrics.jsonl").read_text().splitlines()) == small.epochs
    report = (run.path / "report.html").read_text()
    for heading in ("Training", "Effect of λ", "Embeddings", "Centres", "Reconstructions", "Confusion matrix"):
        assert f"<h2>{heading}</h2>" in report
    assert "http" not in report
    result = json.loads((run.path / "result.json").read_text())
    for key in ("test_acc", "test_nmi", "unlabelled_acc", "autoencoder_kmeans_nmi_test", "clusternet_kmeans_nmi_train"):
        assert 0 <= result[key] <= 100
    rows = list(csv.DictReader((run.path / "predictions.csv").open()))
    assert sum(row["given_label"] != "" for row in rows) == 9

    # The nearest centre gives the class; methods.predict says the same of the same images.
    learner = learner_of(small)
    learner.load_state(load_checkpoint(run.path)["state"])
    z = learner.features(learner.data.x_test)
    nearest = (z[:, None] - learner.network.centres).square().sum(2).argmin(1)
    assert [int(row["label"]) for row in rows if row["split"] == "test"] == nearest.tolist()
    output = run.path / "new.csv"
    assert predict.main([str(run.path), str(stripes), "--output", str(output)]) == 0
    assert [int(row["label"]) for row in csv.DictReader(output.open())] == nearest.tolist()


def test_images_of_unknown_class_and_no_test_part(small: Config, stripes: Path) -> None:
    arrays = dict(np.load(stripes))
    y = arrays["y_train"].copy()
    y[15:] = -1
    np.savez(stripes, x_train=arrays["x_train"], y_train=y)
    run = train(dataclasses.replace(small, labels=0, epochs=2))
    assert not any(key.endswith(("acc", "nmi")) for key in json.loads((run.path / "result.json").read_text()))
    report = (run.path / "report.html").read_text()
    assert "<h2>Predicted classes</h2>" in report
    assert "coloured by predicted class" in report


def test_a_fresh_split_holds_out_a_tenth_of_each_class(small: Config) -> None:
    data = load(small).hold_out(0.1, 0)
    assert torch.bincount(data.y_test).tolist() == [4, 4, 4]
    assert len(data.x_train) == 108
    assert torch.equal(data.hold_out(0.1, 0).x_test, data.hold_out(0.1, 0).x_test)


def test_digits_are_learnt_from_fifty_labels(tmp_path: Path, no_report) -> None:
    """A short run on 500 real digits gets well beyond the nearest centre of the autoencoder's features."""
    config = dataclasses.replace(
        PRESETS["digits"],
        subset=500,
        runs=str(tmp_path / "runs"),
        pretrain_epochs=8,
        pretrain_lr=1e-3,
        epochs=8,
        lr=5e-4,
    )
    config = dataclasses.replace(config, lambda_start=4, lambda_end=7, batch=32, batch_labelled=30)
    config = dataclasses.replace(config, reconstruction_weight=0.05, drop_features=False)
    run = train(config)
    start, last = load_checkpoint(run.path)["state"]["start_figures"], run.history[-1]
    assert last["test_acc"] > max(start["start_test_acc"] + 8, 68)
    assert last["unlabelled_acc"] > max(start["start_unlabelled_acc"] + 12, 72)
    assert last["unlabelled_nmi"] > start["start_unlabelled_nmi"] + 0.1


# ------------------------------------------------------------------------------------------------------ a user's errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels", "15"], "has 1 labelled images, and pairs need two of each"),
        (["--labels", "0"], "must leave some without"),
        (["--percent", "100"], "must leave some without"),
        (["--percent", "-1"], "--percent -1.0 must not be below 0"),
        (["--strides", "2", "2", "2"], "leave a single pixel"),
        (["--strides", "0", "2", "2"], "must be 1 or more"),
        (["--lambda-end", "3"], "--lambda-end 3 must not come before --lambda-start 4"),
        (["--dropout", "1"], "--dropout 1.0"),
        (["--batch", "0"], "--batch 0 must be above 0"),
        (["--holdout", "0.001"], "--holdout 0.001"),
        (["--data", "npz:missing.npz"], "No such file"),
    ],
)
def test_errors_are_one_line_with_exit_code_2(arguments, message, refusal) -> None:
    assert message in refusal(clusternet, arguments)


def test_a_diverging_run_says_so(small: Config, no_report) -> None:
    with pytest.raises(UserError, match="features are no longer finite; a lower --lr"):
        train(dataclasses.replace(small, lr=1e30))
    with pytest.raises(UserError, match="loss is no longer finite; a lower --pretrain-lr"):
        train(dataclasses.replace(small, pretrain_lr=1e30))
