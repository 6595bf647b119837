"""Devices, one parametrisation for all tests: `device` is "cpu" and, where there is a GPU, "cuda".

FASTCLUST_REQUIRE_CUDA=1 turns the skips of a missing GPU into failures.
"""

import os

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
