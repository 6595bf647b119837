"""CycleCluster's variants and its end in rough weather: Mean Teacher, mixed precision, no truth, SIGKILL."""

from __future__ import annotations

import csv
import dataclasses
import multiprocessing
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from methods import predict
from methods.common import report
from methods.common.data import choose_labelled
from methods.common.run import load_checkpoint
from methods.common.sources import load
from methods.cyclecluster import PRESETS, Config, Learner, ramp, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tiny(write_stripes, tmp_path: Path) -> Config:
    """Four epochs of a tenth of a second on stripes in three directions."""
    return dataclasses.replace(
        PRESETS["digits"],
        data=f"npz:{write_stripes(60, 15, contrast=180)}",
        runs=str(tmp_path / "runs"),
        device="cpu",
        labels=9,
        epochs=4,
        anneal_end=5,
        init_epochs=3,
        clusters=5,
        batch_labelled=9,
        batch_unlabelled=17,
    )


def learner_for(config: Config) -> Learner:
    data = load(config)
    given = torch.full_like(data.y_train, -1)
    labelled = choose_labelled(data.y_train, config.labels, 3, 0)
    given[labelled] = data.y_train[labelled]
    learner = Learner(config, data, given)
    learner.progress = type("NoProgress", (), {"step": lambda *_: None})()
    learner.start_epoch(0)
    return learner


def weights(run: Path, part: str = "network") -> torch.Tensor:
    return torch.cat([w.flatten().double() for w in load_checkpoint(run)["state"][part].values()])


# ------------------------------------------------------------------------------------------------------------- variants


def test_the_teacher_is_the_moving_average_and_draws_the_student(tiny: Config) -> None:
    config = dataclasses.replace(tiny, mean_teacher=True, teacher_decay=0.9, consistency=7.0, consistency_ramp=0.0)
    learner = learner_for(config)
    batch = learner.labelled
    weight = learner.network.head.weight
    expected = weight.detach().clone()
    for step in range(4):
        learner.supervised_pass([batch], "")
        expected = weight.detach().clone() if step == 0 else 0.9 * expected + 0.1 * weight.detach()
    torch.testing.assert_close(learner.teacher.module.head.weight, expected)

    # The loss is the cross-entropy plus 7 times the mean square of student's minus teacher's class logits.
    learner.network.train()
    images = learner.data.x_train[batch].float() / 255
    learner.augment = lambda x: x.float() / 255
    student, teacher = learner.network(images)[:, :3], learner.teacher.module(images)[:, :3]
    loss = torch.nn.functional.cross_entropy(student, learner.given[batch])
    mean_of_all = torch.full((len(batch),), 1 / len(batch))
    expected = loss + 7 * (student - teacher).square().mean()
    torch.testing.assert_close(learner.class_loss(batch, learner.given, mean_of_all), expected)
    assert float((student - teacher).detach().square().mean()) > 1e-5


def test_the_ramp_is_mean_teachers() -> None:
    assert ramp(0, 5) == pytest.approx(0.00674, abs=1e-5)
    assert ramp(2.5, 5) == pytest.approx(np.exp(-1.25))
    assert ramp(5, 5) == ramp(9, 5) == ramp(0, 0) == 1


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_computes_in_it_and_keeps_features_and_weights_whole(tiny: Config, precision: str) -> None:
    learner = learner_for(dataclasses.replace(tiny, precision=precision))
    seen: list[torch.dtype] = []
    learner.network.body[0].register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    before = learner.network.head.weight.detach().clone()
    loss = learner.supervised_pass([learner.labelled] * 3, "")
    features = learner.features(learner.data.x_train)
    assert 0 < loss < 5
    assert set(seen) == {getattr(torch, precision)}
    assert features.dtype == learner.network.head.weight.dtype == torch.float32
    torch.testing.assert_close(features.norm(dim=1), torch.ones(60))
    assert (learner.network.head.weight != before).any()
    assert learner.scaler.is_enabled() == (precision == "float16")


@pytest.mark.usefixtures("without_figures")
def test_every_variant_in_one_run_cut_short(tiny: Config, monkeypatch) -> None:
    config = dataclasses.replace(
        tiny, mean_teacher=True, rand_augment=1, precision="bfloat16", epochs=2, class_logits="all", weight_norm=True
    )
    whole = train(config)
    plain, passes = Learner.cluster_pass, []

    def interrupted(self, *arguments):
        passes.append(1)
        if len(passes) == 2:
            raise KeyboardInterrupt
        return plain(self, *arguments)

    monkeypatch.setattr(Learner, "cluster_pass", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    (cut,) = [path for path in Path(config.runs).iterdir() if path != whole.path]
    train(config, cut)
    assert torch.equal(weights(cut), weights(whole.path))
    assert torch.equal(weights(cut, "teacher"), weights(whole.path, "teacher"))


# ---------------------------------------------------------------------------------------------------- without the truth


def test_a_folder_without_truth_from_one_command_to_new_predictions(tiny: Config, tmp_path: Path, capsys) -> None:
    from PIL import Image

    data = load(tiny)
    folder, new = tmp_path / "photos", tmp_path / "new"
    (folder / "more").mkdir(parents=True), new.mkdir()
    rng = random.Random(0)
    truth = {}
    for index, (pixels, label) in enumerate(zip(data.x_train, data.y_train.tolist(), strict=True)):
        name = f"{'more/' if index % 2 else ''}{index}.{'png' if index % 3 else 'jpg'}"
        side = rng.randint(16, 40)
        Image.fromarray(pixels[0].numpy()).resize((side, side)).save(folder / name)
        truth[name] = "abc"[label]
    (folder / "broken.png").write_bytes(b"\x89PNG and no more")
    labelled = list(truth)[:9]
    (folder / "labels.csv").write_text("file,label\n" + "".join(f"{name},{truth[name]}\n" for name in labelled))
    Image.fromarray(data.x_test[1][0].numpy()).save(new / "x.png")

    keep = {name: getattr(tiny, name) for name in ("runs", "device", "epochs", "anneal_end", "clusters")}
    config = dataclasses.replace(
        PRESETS["folder"], data=f"folder:{folder}", image_size=8, pad=0, flip=False, neighbours=10, **keep
    )
    run = train(config)
    said = capsys.readouterr()
    assert "left out" in said.err
    assert "test error" not in said.out
    rows = list(csv.DictReader((run.path / "predictions.csv").open()))
    assert [row["image"] for row in rows] == sorted(truth, key=lambda name: Path(name).parts)
    assert sum(row["given_label"] != "" for row in rows) == 9
    assert np.mean([row["label"] == truth[row["image"]] for row in rows]) > 0.9
    assert "broken.png" in (run.path / "left_out.csv").read_text()
    assert not any("error" in name for name in run.history[-1])
    report = (run.path / "report.html").read_text()
    assert "Predicted classes" in report
    assert "Confusion" not in report
    assert "more/11.png" in report
    assert predict.main([str(run.path), str(new)]) == 0
    assert f"{new / 'x.png'},{'abc'[data.y_test[1]]}," in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------------- SIGKILL


def _train(config: Config, folder: Path | None) -> None:
    torch.set_num_threads(1)
    report.drawn = report.embedding = lambda *_: ""  # figures take longer than the training, which is to be killed
    train(config, folder)


def test_a_run_killed_at_five_random_moments_ends_with_the_same_bits(tiny: Config) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["methods.cyclecluster", "torch.utils.tensorboard", "matplotlib.figure"])

    def start(runs: str) -> multiprocessing.Process:
        folder = next((path.parent for path in Path(runs).glob("*/config.json")), None)
        process = context.Process(target=_train, args=(dataclasses.replace(config, runs=runs), folder))
        process.start()
        return process

    def saved() -> int:
        return sum(len(path.read_text().splitlines()) for path in (runs / "killed").glob("*/metrics.jsonl"))

    config = dataclasses.replace(tiny, epochs=8, anneal_end=9)
    runs = Path(config.runs)
    warm = context.Process(target=int)  # the first one waits for the server's imports
    warm.start(), warm.join()
    started = time.monotonic()
    start(str(runs / "whole")).join()
    duration = time.monotonic() - started
    (whole,) = (runs / "whole").iterdir()
    killed = 0
    while killed < 5:
        before = saved()
        process = start(str(runs / "killed"))
        while killed % 2 == 0 and process.is_alive() and saved() == before:
            time.sleep(0.01)  # every other one leaves an epoch to go on from
        process.join(random.uniform(0, 0.15) * duration)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        killed += process.exitcode != 0
        if process.exitcode == 0:  # a resumed run may be over sooner than the kill: begin again
            for path in sorted((runs / "killed").rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
    assert saved() > 0
    process = start(str(runs / "killed"))
    process.join()
    assert process.exitcode == 0
    (ended,) = (path.parent for path in (runs / "killed").glob("*/config.json"))  # a kill may leave an empty folder
    assert torch.equal(weights(ended), weights(whole))
    assert (ended / "predictions.csv").read_text() == (whole / "predictions.csv").read_text()
    assert not list(ended.glob(".*")), "a part of a file was left behind"
