"""Fixtures of all tests, and the deselection of those marked ``full``, and of those marked ``gpu`` without a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before torch and NumPy load their thread pools: threads that spin while they wait crawl on a busy machine.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import hypothesis
import pytest
import torch
from support import ENGINES

import fusedrnn

# The same examples each time, so that anyone can run a failure again.
hypothesis.settings.register_profile(
    "repeatable",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("repeatable")


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without ``-m`` leave out the tests marked ``full``, without a GPU those marked ``gpu``.

    Whatever has a case or a target on a GPU among its parameters is marked here.
    """
    for item in items:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if any(getattr(getattr(value, "target", value), "device", None) == "cuda" for value in parameters):
            item.add_marker("gpu")
    leave_out = {"full"} if not config.option.markexpr else set()
    leave_out |= set() if torch.cuda.is_available() else {"gpu"}
    kept, left_out = [], []
    for item in items:
        (left_out if leave_out & {mark.name for mark in item.iter_markers()} else kept).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same random numbers, alone or after others."""
    torch.manual_seed(0)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each engine that this machine has, forced during the test."""
    with fusedrnn.engine(request.param):
        yield request.param
