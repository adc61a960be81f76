"""Options and markers that all tests share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.logged import messages


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run tests marked slow, too")
    parser.addoption(
        "--parity-data",
        type=Path,
        default=Path(__file__).parent / "parity" / "data",
        help="folder of reference outputs of the official models (.npz)",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: minutes rather than seconds (--slow)"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="gpu: no CUDA device here"))


@pytest.fixture(scope="session", autouse=True)
def _as_on_a_terminal() -> None:
    """Under `nohup`, SIGHUP is ignored, and what the tests start would inherit that."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Roles set torch's threads for the whole process: every test starts from the same number."""
    torch.set_num_threads(1)


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """Messages that the packages log while the test runs."""
    with messages() as found:
        yield found


@pytest.fixture(scope="session", autouse=True)
def _runs_are_not_the_users(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Runs of tests are not remembered among those of whoever tests; subprocesses inherit it."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))
