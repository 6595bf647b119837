"""Benches are quick by default; --full measures the sizes that docs/results quotes."""

import math
import time
from collections.abc import Callable
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="the full sizes: minutes, on an otherwise idle machine")


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--full"))


@pytest.fixture
def measure(benchmark: Any, full: bool) -> Callable[..., Any]:
    """Times a call: once to warm up, then at least five times, and a short one for two seconds.

    A moment in which others take the cores should not decide a median. Without --full once is enough, and a fifth of a
    second.
    """
    least, budget = (5, 2.0) if full else (1, 0.2)

    def run(call: Callable[..., Any], *arguments: Any) -> Any:
        begin = time.perf_counter()
        call(*arguments)
        seconds = time.perf_counter() - begin
        return benchmark.pedantic(call, arguments, rounds=min(max(least, math.ceil(budget / seconds)), 200))

    return run
