"""Every kind of file that the pages say is read has a test that reads one."""

from __future__ import annotations

import pytest

from tests.file_rows import marks, rows


@pytest.mark.parametrize("page", ["actors/README.md", "rewards/README.md"])
def test_every_row_has_a_test(page: str) -> None:
    assert sorted(set(rows(page))) == sorted(set(marks(page)))
    assert len(set(rows(page))) == len(rows(page)), "a row twice"
