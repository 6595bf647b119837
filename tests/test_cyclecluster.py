"""CycleCluster: each step against its equation, the loop on real digits, runs cut short, a user's errors."""

from __future__ import annotations

import csv
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastclust
from methods import cyclecluster, predict
from methods.common.data import choose_labelled
from methods.common.run import load_checkpoint
from methods.common.sources import load
from methods.common.training import cosine
from methods.cyclecluster import PRESETS, Config, Learner, match_ids, train

pytestmark = pytest.mark.usefixtures("one_thread")


class NoProgress:
    def step(self, title: str) -> None:
        pass


@pytest.fixture
def stripes(write_stripes) -> Path:
    return write_stripes(150, 30)


@pytest.fixture
def small(stripes: Path, tmp_path: Path) -> Config:
    """Settings of a run that takes a second or two."""
    return dataclasses.replace(
        PRESETS["digits"],
        data=f"npz:{stripes}",
        labels=9,
        runs=str(tmp_path / "runs"),
        epochs=3,
        anneal_end=4,
        clusters=6,
        neighbours=10,
        batch_labelled=12,
        batch_unlabelled=12,
    )


@pytest.fixture
def learner(small: Config) -> Learner:
    data = load(small)
    given = torch.full_like(data.y_train, -1)
    labelled = choose_labelled(data.y_train, small.labels, 3, 0)
    given[labelled] = data.y_train[labelled]
    learner = Learner(small, data, given)
    learner.progress = NoProgress()
    learner.start_epoch(0)
    return learner


# -------------------------------------------------------------------------------------------------- steps and equations


def test_ids_are_matched_to_the_outputs_that_agree_most() -> None:
    truth = torch.randint(6, (300,))
    order = torch.randperm(6)
    probability = F.one_hot(order[truth], 6).float() * 0.5 + torch.rand(300, 6) * 0.2
    assert torch.equal(match_ids(truth, probability), order[truth])


def test_cluster_pass_shows_each_image_once_with_its_cluster(learner: Learner, monkeypatch) -> None:
    clusters = torch.randint(6, (150,))
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(learner, "augment", lambda images: seen.append(images) or images.float() / 255)
    targets: list[torch.Tensor] = []
    plain = F.cross_entropy
    monkeypatch.setattr(
        cyclecluster.F, "cross_entropy", lambda logits, y, **how: targets.append(y) or plain(logits, y, **how)
    )
    learner.cluster_pass(clusters, "")
    images, labels = torch.cat(seen), torch.cat(targets)
    for image, label in zip(images, labels, strict=True):
        index = (learner.data.x_train == image).flatten(1).all(1).nonzero()
        assert clusters[index] == label
    assert len(images.flatten(1).unique(dim=0)) == len(learner.data.x_train.flatten(1).unique(dim=0))


def test_cluster_passes_teach_the_clusters(learner: Learner) -> None:
    clusters = learner.data.y_train + 3  # in outputs that no class uses
    losses = [learner.cluster_pass(clusters, "") for _ in range(15)]
    assert losses[-1] < losses[0] / 2


def test_class_pass_is_equation_6(learner: Learner, monkeypatch) -> None:
    n = len(learner.given)
    class_weights, residual, n_iter = torch.tensor([0.5, 1.0, 2.0]), torch.zeros(3), torch.ones(3, dtype=torch.int64)
    pseudo = fastclust.PseudoLabels(
        torch.randint(3, (n,)), torch.rand(n), class_weights, torch.rand(n, 3), residual, n_iter
    )
    pseudo.weights[learner.labelled] = 1.0
    pseudo.labels[learner.labelled] = learner.given[learner.labelled]
    per_image = torch.rand(n)
    batches: list[torch.Tensor] = []
    losses: list[torch.Tensor] = []
    monkeypatch.setattr(
        learner, "class_loss", lambda batch, _, weights: batches.append(batch) or (weights * per_image[batch]).sum()
    )
    monkeypatch.setattr(learner, "update", lambda loss, _: losses.append(loss) or loss)
    learner.class_pass(pseudo, "")
    zeta = pseudo.class_weights[pseudo.labels]
    for batch, loss in zip(batches, losses, strict=True):
        known = learner.given[batch] >= 0
        assert int(known.sum()) == learner.config.batch_labelled
        labelled, unlabelled = batch[known], batch[~known]
        expected = (zeta * per_image)[labelled].mean() + (zeta * pseudo.weights * per_image)[unlabelled].mean()
        torch.testing.assert_close(loss, expected)
    visited = torch.cat(batches)
    assert torch.equal(visited[learner.given[visited] < 0].sort().values, learner.unlabelled)


def test_one_cosine_runs_over_both_passes(learner: Learner, monkeypatch) -> None:
    rates: list[float] = []
    step = learner.optimizer.step
    monkeypatch.setattr(
        learner.optimizer, "step", lambda: rates.append(learner.optimizer.param_groups[0]["lr"]) or step()
    )
    learner.start_epoch(1)
    metrics: dict = {}
    features = learner.features(learner.data.x_train)
    classes = learner.class_pseudo_labels(features, metrics)
    learner.cluster_pass(learner.cluster_pseudo_labels(features, classes.labels, metrics), "")
    learner.class_pass(classes, "")
    config = learner.config
    n_steps = learner.cluster_steps + learner.class_steps
    expected = [cosine(config.lr, 1 + i / n_steps, config.anneal_end) for i in range(n_steps)]
    assert rates == pytest.approx(expected)


def test_pseudo_labels_keep_the_given_labels_and_find_the_others(learner: Learner) -> None:
    metrics: dict = {}
    features = learner.features(learner.data.x_train)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(150))
    pseudo = learner.class_pseudo_labels(features, metrics)
    assert torch.equal(pseudo.labels[learner.labelled], learner.given[learner.labelled])
    clusters = learner.cluster_pseudo_labels(features, pseudo.labels, metrics)
    assert clusters.unique().tolist() == list(range(6))
    assert metrics["unreached"] == 0
    assert 0 < metrics["diffusion_residual"] < 0.5
    assert metrics["cluster_smallest"] >= 1


def test_more_outputs_than_classes_share_one_head(learner: Learner) -> None:
    assert learner.network.head.out_features == 6
    assert learner.probabilities(learner.data.x_test).shape == (30, 3)
    torch.testing.assert_close(learner.probabilities(learner.data.x_test).sum(1), torch.ones(30))


# ----------------------------------------------------------------------------------------------------------- whole runs


def weights(run: Path) -> torch.Tensor:
    return torch.cat([w.flatten().double() for w in load_checkpoint(run)["state"]["network"].values()])


def without_times(history: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if not name.startswith("seconds")} for row in history]


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize("kmeans_init", ["k-means++", "warm_start"])
def test_a_run_cut_short_ends_as_if_it_had_not_been(small: Config, monkeypatch, kmeans_init: str) -> None:
    config = dataclasses.replace(small, kmeans_init=kmeans_init)
    whole = train(config)
    plain, passes = Learner.class_pass, []

    def interrupted(self, *arguments):
        passes.append(1)
        if len(passes) == 3:
            raise KeyboardInterrupt
        return plain(self, *arguments)

    monkeypatch.setattr(Learner, "class_pass", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    folder = next(path for path in Path(config.runs).iterdir() if path != whole.path)
    assert len(load_checkpoint(folder)["history"]) == 2
    torch.rand(5)  # a new process would not have its generators where the old one left them
    resumed = train(config, folder)
    assert torch.equal(weights(resumed.path), weights(whole.path))
    assert without_times(resumed.history) == without_times(whole.history)
    assert (resumed.path / "predictions.csv").read_text() == (whole.path / "predictions.csv").read_text()


@pytest.mark.usefixtures("without_figures")
def test_a_run_stopped_before_its_first_epoch_starts_over(small: Config, monkeypatch) -> None:
    whole = train(small)
    plain = Learner.features
    monkeypatch.setattr(Learner, "features", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(small)
    monkeypatch.setattr(Learner, "features", plain)
    folder = next(path for path in Path(small.runs).iterdir() if path != whole.path)
    assert torch.equal(weights(train(small, folder).path), weights(whole.path))


def test_the_folder_a_run_leaves_and_predictions_from_it(small: Config, stripes: Path, capsys, tmp_path: Path) -> None:
    run = train(small)
    said = capsys.readouterr().out
    assert "test error" in said
    assert f"python -m methods.predict {run.path}" in said
    assert len((run.path / "metrics.jsonl").read_text().splitlines()) == small.epochs
    assert json.loads((run.path / "config.json").read_text())["settings"]["labels"] == 9
    report = (run.path / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 3 + 2 * 24  # curves, confusion, features; two rows of images
    assert "http" not in report
    rows = list(csv.DictReader((run.path / "predictions.csv").open()))
    assert len(rows) == 180
    assert sum(row["given_label"] != "" for row in rows) == 9
    assert all(0 <= float(row["confidence"]) <= 1 for row in rows)

    # The same images from an .npz and from files get the same classes as in the run.
    from PIL import Image

    test = np.load(stripes)["x_test"]
    Image.fromarray(test[4]).save(tmp_path / "four.png")
    (tmp_path / "broken.png").write_bytes(b"not an image")
    output = tmp_path / "out.csv"
    arguments = [stripes, tmp_path / "four.png", tmp_path / "broken.png"]
    assert predict.main([str(run.path), *map(str, arguments), "--output", str(output)]) == 0
    assert "left out" in capsys.readouterr().err
    found = [row["label"] for row in csv.DictReader(output.open())]
    expected = [row["label"] for row in rows if row["split"] == "test"]
    assert found == [*expected, expected[4]]


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize("baseline", ["supervised", "graph"])
def test_baselines_leave_out_what_they_should(small: Config, monkeypatch, baseline: str) -> None:
    def never(*_, **__):
        raise AssertionError("not a part of this baseline")

    monkeypatch.setattr(fastclust, "kmeans", never)
    if baseline == "supervised":
        monkeypatch.setattr(fastclust, "knn_graph", never)
    run = train(dataclasses.replace(small, baseline=baseline, epochs=2))
    assert "loss_clusters" not in run.history[-1]


def learnt_from_digits(tmp_path: Path) -> bool:
    """Whether five epochs on the real digits do what they should, in every part of the method."""
    config = dataclasses.replace(PRESETS["digits"], epochs=5, anneal_end=6, runs=str(tmp_path / "runs"))
    last = train(config).history[-1]
    return (
        last["test_error"] < 10
        and last["pseudo_label_error"] < 10
        and last["cluster_nmi"] > 0.6
        and last["loss_clusters"] < 3.5  # log 60 = 4.1 is a network that knows nothing of them
    )


@pytest.mark.usefixtures("without_figures")
def test_digits_are_learnt_from_fifty_labels(tmp_path: Path) -> None:
    assert learnt_from_digits(tmp_path)


@pytest.mark.parametrize("idle", ["clusters", "graph", "class pass"])
def test_digits_are_not_learnt_where_a_part_does_nothing(tmp_path: Path, monkeypatch, idle: str) -> None:
    monkeypatch.setattr(cyclecluster, "write_results", lambda *_, **__: None)
    if idle == "clusters":
        kmeans = fastclust.kmeans

        def one_cluster(*arguments, **options) -> fastclust.KMeansResult:
            found = kmeans(*arguments, **options)
            return found._replace(labels=torch.zeros_like(found.labels))

        monkeypatch.setattr(fastclust, "kmeans", one_cluster)
    elif idle == "graph":
        knn_graph = fastclust.knn_graph

        def no_edges(*arguments, **options) -> torch.Tensor:
            graph = knn_graph(*arguments, **options)
            return torch.sparse_csr_tensor(
                graph.crow_indices(), graph.col_indices(), 0 * graph.values(), graph.shape, check_invariants=False
            )

        monkeypatch.setattr(fastclust, "knn_graph", no_edges)
    else:
        monkeypatch.setattr(Learner, "class_pass", lambda *_: 0.0)
    assert not learnt_from_digits(tmp_path)


# ------------------------------------------------------------------------------------------------------ a user's errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "imagenet"], "--data imagenet is unknown"),
        (["--data", "npz:missing.npz"], "No such file"),
        (["--labels", "7"], "fewer than one for each of the 10 classes"),
        (["--labels", "5000"], "more than the 1437"),
        (["--labels", "0"], "must leave some without"),
        (["--clusters", "1500"], "more than the 1437"),
        (["--neighbours", "1437"], "needs more than 1437"),
        (["--alpha", "1"], "--alpha 1.0 must lie between 0 and 1"),
        (["--epochs", "0"], "--epochs 0 must be above 0"),
        (["--anneal-end", "3"], "--anneal-end 3"),
        (["--network", "vgg"], "--network vgg is unknown"),
        (["--device", "abacus"], "--device abacus"),
        (["--threads", "-1"], "--threads -1"),
    ],
)
def test_errors_are_one_line_with_exit_code_2(arguments, message, refusal) -> None:
    assert message in refusal(cyclecluster, arguments)


def test_a_diverging_run_says_so(small: Config) -> None:
    from methods.common.errors import UserError

    with pytest.raises(UserError, match="no longer finite"):
        train(dataclasses.replace(small, lr=1e30))


def test_the_command_itself_on_a_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 and nothing more")
    command = [sys.executable, "-m", "methods.cyclecluster", "--data", f"npz:{tmp_path}/bad.npz"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert "bad.npz cannot be read" in ended.stderr


def test_predict_refuses_in_one_line(tmp_path: Path, capsys) -> None:
    assert predict.main([str(tmp_path), "x.png"]) == 2
    assert capsys.readouterr().err == f"predict: {tmp_path} holds no checkpoint.pt\n"
