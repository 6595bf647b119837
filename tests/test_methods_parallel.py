"""Two processes (gloo) against one: batch normalisation, outputs, and a whole training, equal up to rounding."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from methods.common import parallel
from methods.common.run import load_checkpoint
from methods.common.training import infer
from methods.cyclecluster import PRESETS, Config, train

pytestmark = pytest.mark.usefixtures("one_thread")


def on_two(work: Callable, *arguments) -> None:
    """Run `work(*arguments)` in two processes as torchrun would start them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["methods.cyclecluster"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=_as_rank, args=(rank, port, work, arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [0, 0]


def _as_rank(rank: int, port: int, work: Callable, arguments: tuple) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    with parallel.joined():
        work(*arguments)


def test_shares_are_all_there_is_and_even(monkeypatch) -> None:
    monkeypatch.setattr(parallel, "world_size", lambda: 3)
    for n in (0, 1, 2, 3, 10, 11):
        parts = []
        for rank in range(3):
            monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
            parts.append(list(range(n))[parallel.share(n)])
        assert [index for part in parts for index in part] == list(range(n))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def _normalise(folder: Path) -> None:
    """Two steps of batch normalisation on uneven shares; the gradients of all that takes part."""
    torch.manual_seed(0)
    network = parallel.share_batch_norm(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten()))
    images, target = torch.randn(2, 7, 2, 5, 5), torch.randn(7, 27)
    images.requires_grad_()
    for step in range(2):
        mine = parallel.share(7)
        loss = (network(images[step][mine] * 3 + 1) - target[mine]).square().sum()
        loss.backward()
    parallel.add_up_gradients(network.parameters())
    network.eval()
    outputs = infer(network, torch.arange(250).to(torch.uint8).reshape(5, 2, 5, 5), batch=2)
    found = [parallel.add_up(images.grad), *(w.grad for w in network.parameters()), *network.state_dict().values()]
    torch.save([*found, outputs], folder / f"{parallel.rank()}-of-{parallel.world_size()}")


def test_batch_norm_and_outputs_of_two_processes_are_those_of_one(tmp_path: Path) -> None:
    _normalise(tmp_path)
    on_two(_normalise, tmp_path)
    one = torch.load(tmp_path / "0-of-1")
    for rank in range(2):
        two = torch.load(tmp_path / f"{rank}-of-2")
        torch.testing.assert_close(two, one, atol=1e-4, rtol=1e-4)


@pytest.fixture
def config(write_stripes) -> Config:
    return dataclasses.replace(
        PRESETS["digits"],
        data=f"npz:{write_stripes(51, 14, contrast=180)}",
        labels=9,
        device="cpu",
        epochs=2,
        anneal_end=3,
        init_epochs=2,
        clusters=3,
        batch_labelled=9,
        batch_unlabelled=10,
        rand_augment=1,
        mean_teacher=True,
        consistency=1.0,
    )


def _train(config: Config) -> None:
    train(config)


def test_a_training_on_two_processes_is_that_of_one(config: Config, tmp_path: Path) -> None:
    one = train(dataclasses.replace(config, runs=str(tmp_path / "one")))
    on_two(_train, dataclasses.replace(config, runs=str(tmp_path / "two")))
    (folder,) = (tmp_path / "two").iterdir()  # one folder: only the first process writes
    assert (folder / "result.json").exists()
    weights, history = (load_checkpoint(one.path)[name] for name in ("state", "history"))
    again, history_again = (load_checkpoint(folder)[name] for name in ("state", "history"))
    for part in ("network", "teacher"):
        torch.testing.assert_close(again[part], weights[part], atol=2e-4, rtol=2e-3)
    for row, other in zip(history, history_again, strict=True):
        for name in ("loss_clusters", "loss_classes", "entropy_weight"):
            assert other[name] == pytest.approx(row[name], rel=1e-3)
