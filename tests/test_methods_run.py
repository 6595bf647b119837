"""The run's folder: whole files, metrics that agree with the checkpoint, draws that go on where they stopped."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from methods.common.config import RunConfig, launch, load_config, parse
from methods.common.data import ImageData
from methods.common.errors import UserError
from methods.common.progress import Progress
from methods.common.run import Run, rng_state, set_rng_state, write_whole
from methods.common.training import cosine, cycled, infer, pick_device, shuffled

PRESETS = {"digits": RunConfig(), "other": RunConfig(preset="other", data="digits", labels=7)}


def images(pixel: int = 0, **more) -> ImageData:
    x, y = torch.full((4, 1, 8, 8), pixel, dtype=torch.uint8), torch.tensor([0, 1, -1, -1])
    return ImageData("set", x, y, x[:2], y[:2], ("cat", "dog"), **more)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return RunConfig(runs=str(tmp_path / "runs"))


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = write_whole(tmp_path / "file", lambda file: file.write(b"old"))

    def fail(file) -> None:
        file.write(b"half of the n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, fail)
    assert path.read_bytes() == b"old"
    write_whole(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_every_generator_goes_on_where_it_stopped() -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    np.random.standard_normal()  # leaves a cached second value behind

    def draws() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.standard_normal(), float(torch.rand(()))]

    state = rng_state()
    first = draws()
    assert draws() != first
    set_rng_state(state)
    assert draws() == first


def test_what_was_saved_comes_back_and_metrics_agree_with_it(config: RunConfig) -> None:
    with Run("paper", config, images()) as run:
        run.save({"epoch": 1, "loss": 2.0}, weights=torch.ones(3), epoch=1)
        run.save({"epoch": 2, "loss": 1.0}, weights=torch.zeros(3), epoch=2)
        drawn = torch.rand(4)
    (run.path / "metrics.jsonl").open("a").write('{"epoch": 3, "lo')  # as a kill in mid-write would leave it
    with Run("paper", config, images(), run.path) as again:
        state = again.restore()
    assert state["epoch"] == 2
    assert torch.equal(state["weights"], torch.zeros(3))
    assert torch.equal(torch.rand(4), drawn)
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert rows == again.history == [{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 1.0}]
    assert any(file.name.startswith("events.out.tfevents") for file in run.path.iterdir())


def test_runs_of_the_same_second_have_folders_of_their_own(config: RunConfig) -> None:
    assert len({Run("paper", config, images()).path for _ in range(3)}) == 3


def test_a_run_is_not_resumed_on_other_data_or_from_a_damaged_checkpoint(config: RunConfig) -> None:
    run = Run("paper", config, images())
    assert run.restore() is None
    run.save({"epoch": 1}, epoch=1)
    with pytest.raises(UserError, match="other data"):
        Run("paper", config, images(1), run.path).restore()
    (run.path / "checkpoint.pt").write_bytes((run.path / "checkpoint.pt").read_bytes()[:300])
    with pytest.raises(UserError, match=r"checkpoint\.pt cannot be read"):
        Run("paper", config, images(), run.path).restore()


def test_predictions_name_every_image_and_left_out_files_are_listed(config: RunConfig) -> None:
    data = images(files=("a.png", "b/c.png", "d.png", "e.png"), left_out=(("x.png", "truncated"),))
    run = Run("paper", config, data)
    run.write_predictions(data, torch.tensor([1, -1, -1, -1]), torch.tensor([[0.2, 0.8]] * 4), torch.eye(2))
    assert (run.path / "predictions.csv").read_text().splitlines() == [
        "split,image,label,confidence,given_label",
        "train,a.png,dog,0.8000,dog",
        *(f"train,{name},dog,0.8000," for name in ("b/c.png", "d.png", "e.png")),
        "test,0,cat,1.0000,",
        "test,1,dog,1.0000,",
    ]
    assert (run.path / "left_out.csv").read_text() == "file,reason\nx.png,truncated\n"


def test_ctrl_c_tells_how_to_go_on(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run("paper", config, images())
    run.save({"epoch": 1}, epoch=1)
    with pytest.raises(KeyboardInterrupt), run:
        raise KeyboardInterrupt
    said = capsys.readouterr().err
    assert "1 epoch" in said
    assert f"python -m methods.paper --resume {run.path}" in said


def test_the_command_line_starts_from_a_preset(config: RunConfig) -> None:
    assert parse(PRESETS, [], "paper") == (PRESETS["digits"], None)
    assert parse(PRESETS, ["--data", "other", "--seed", "3"], "paper")[0].labels == 7
    assert parse(PRESETS, ["--preset=other", "--labels", "9"], "paper")[0] == RunConfig(
        preset="other", data="digits", labels=9
    )


def test_a_resumed_run_has_the_settings_it_was_started_with(config: RunConfig) -> None:
    run = Run("paper", config, images())
    assert load_config(run.path, RunConfig, "paper") == config
    assert parse(PRESETS, ["--resume", str(run.path)], "paper") == (config, run.path)


def test_what_cannot_be_resumed(config: RunConfig, tmp_path: Path) -> None:
    run = Run("paper", config, images())
    for argv, message in (
        (["--resume", str(run.path), "--seed", "1"], "without any other option"),
        (["--resume", str(tmp_path)], "is no run's folder"),
    ):
        with pytest.raises(UserError, match=message):
            parse(PRESETS, argv, "paper")
    with pytest.raises(UserError, match="a run of paper, not of essay"):
        load_config(run.path, RunConfig, "essay")
    (run.path / "config.json").write_text('{"method": "paper", "settings": {"colour": 1}}')
    with pytest.raises(UserError, match="another version"):
        load_config(run.path, RunConfig, "paper")
    (run.path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_config(run.path, RunConfig, "paper")


def test_a_users_error_is_one_line_and_exit_code_2(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    def train(config: RunConfig, resume: Path | None) -> None:
        raise UserError("that will not do")

    monkeypatch.setattr("sys.argv", ["paper", "--seed", "1"])
    assert launch("paper", PRESETS, train) == 2
    assert capsys.readouterr().err == "paper: that will not do\n"
    monkeypatch.setattr("sys.argv", ["paper", "--preset", "none"])
    assert launch("paper", PRESETS, train) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seed", "one"], "--seed"),
        (["--colour", "red"], "Unrecognized options: --colour, red"),
        (["--seed"], "Missing value for argument '--seed'"),
        (["--splits", "0"], "--splits 0 must be above 0"),
    ],
)
def test_a_wrong_option_is_one_line_too(arguments, words, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["paper", *arguments])
    assert launch("paper", PRESETS, lambda *_: None) == 2
    said = capsys.readouterr().err
    assert said.startswith("paper: ")
    assert said.count("\n") == 1
    assert words in said


def test_progress_off_a_terminal_is_a_line_per_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(total=4, done=2) as progress:
        for epoch in (2, 3):
            progress.step("epoch")
            progress.epoch(f"epoch {epoch}", {"loss": "0.1"})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[-1].startswith("epoch 3  loss 0.1")
    assert lines[-1].endswith("0:00 left)")


def test_batches_visit_each_index_once_or_cycle_evenly() -> None:
    indices = torch.arange(100, 123)
    batches = shuffled(indices, 4)
    assert sorted(len(batch) for batch in batches) == [5, 6, 6, 6]
    assert torch.equal(torch.cat(batches).sort().values, indices)
    batches = cycled(indices, 7, 10)
    assert [len(batch) for batch in batches] == [10] * 7
    counts = torch.bincount(torch.cat(batches) - 100, minlength=23)
    assert int(counts.max()) - int(counts.min()) == 1


def test_cosine_and_infer_and_device() -> None:
    assert cosine(0.4, 0, 10) == pytest.approx(0.4)
    assert cosine(0.4, 5, 10) == pytest.approx(0.2)
    assert cosine(0.4, 10, 10) == pytest.approx(0)
    images = torch.randint(0, 256, (25, 1, 4, 4), dtype=torch.uint8)
    assert torch.equal(infer(lambda x: x.mean((1, 2, 3)), images, batch=7), (images.float() / 255).mean((1, 2, 3)))
    with pytest.raises(UserError, match="--device abacus"):
        pick_device("abacus")
