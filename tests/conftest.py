"""Devices, one parametrisation for all tests: `device` is "cpu" and, where there is a GPU, "cuda".

FASTCLUST_REQUIRE_CUDA=1 turns the skips of a missing GPU into failures.
"""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("fastclust", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("fastclust")


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        message = "no GPU"
        if os.environ.get("FASTCLUST_REQUIRE_CUDA") == "1":
            pytest.fail(message)
        pytest.skip(message)
    return request.param


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests of tiny networks, which a second thread only slows down where the cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
