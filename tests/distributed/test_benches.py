"""Every bench on Ray starts, with its smallest options, and prints its figures."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from cluster.ray_session import session
from cluster.ray_session.session import RaySession
from tests.bench_runs import ALONE, ON_RAY, run_bench
from tests.distributed.hosts.network import why_not


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_RAY)
def test_it_starts_and_prints_figures(
    name: str,
    ray_session: RaySession,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(session, "RaySession", lambda config: nullcontext(ray_session))
    assert run_bench(name, ON_RAY[name], monkeypatch, capsys)


@pytest.mark.slow
def test_the_main_job(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    figures = run_bench("main_job", ALONE["main_job"], monkeypatch, capsys)
    assert figures["exit_status"] == "0"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ALONE if name != "main_job"])
def test_those_that_start_programs(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "links" and (reason := why_not()):
        pytest.skip(reason)
    assert run_bench(name, ALONE[name], monkeypatch, capsys)
