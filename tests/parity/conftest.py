"""Parametrises tests with every reference file of the folder: `reference` by the test's family."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parity.reference import Reference, references


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "reference" in metafunc.fixturenames:
        folder: Path = metafunc.config.getoption("--parity-data")
        found = references(folder, metafunc.module.FAMILY)
        metafunc.parametrize(
            "reference", found, ids=[item.path.stem for item in found], scope="module"
        )


@pytest.fixture
def reference(request: pytest.FixtureRequest) -> Reference:
    return request.param
