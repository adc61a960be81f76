"""Options and markers that all tests share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Here, in workers and in programs that the tests start: threads wait for each other by spinning,
# which costs the tests beside them more than it gains. Set before numpy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():  # Triton's kernels run on the CPU; read when triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.logged import messages

ONE_RAY = ("tests/distributed/hosts/", "tests/distributed/failures/", "tests/distributed/")
"""Folders whose tests share a Ray."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run tests marked slow, too")
    parser.addoption(
        "--parity-data",
        type=Path,
        default=Path(__file__).parent / "parity" / "data",
        help="folder of reference outputs of the official models (.npz)",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Distribute folders of tests over worker processes; files and single tests run in this one.

    `-n` sets the number of workers, 0 for none.
    """
    option = config.option
    distributes = config.pluginmanager.hasplugin("xdist") and not hasattr(config, "workerinput")
    if not distributes or option.numprocesses is not None:
        return
    if option.capture != "no" and all(Path(path).is_dir() for path in config.args):
        option.numprocesses = "auto"
        option.loadscopereorder = False  # tests with Ray are collected first, and take longest


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than there are usable CPUs, since tests with Ray mostly wait."""
    return min(4, 1 + len(os.sched_getaffinity(0)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        """A folder whose tests share a Ray goes to one worker, all others file by file."""

        def _split_scope(self, nodeid: str) -> str:
            folder = [each for each in ONE_RAY if nodeid.startswith(each)]
            return folder[0] if folder else nodeid.partition("::")[0]

    return Scheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: minutes rather than seconds (--slow)"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
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
    """Keeps runs of tests out of the user's discovery files; subprocesses inherit it."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))
