"""The CSV of a part: sorted, with a fixed format, and refused where it is damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cluster.errors import DataError
from learner.miniature.study.results import Results, missing, read_csv, to_csv, write_csv

FIGURES = {
    (2, "base, CFG 2"): {"fid": 2.0, "accuracy": 1 / 3},
    (1, "base, CFG 2"): {"fid": 1234567.0, "accuracy": float("nan")},
    (2, "both"): {"fid": 1e-9},
}
TEXT = """\
part,seed,policy,metric,value
llamagen,1,"base, CFG 2",accuracy,nan
llamagen,1,"base, CFG 2",fid,1.23457e+06
llamagen,2,"base, CFG 2",accuracy,0.333333
llamagen,2,"base, CFG 2",fid,2
llamagen,2,both,fid,1e-09
"""


def test_lines_are_sorted_and_numbers_have_six_digits(tmp_path: Path) -> None:
    results = Results("llamagen", (1, 2), FIGURES)
    assert to_csv(results) == TEXT
    write_csv(results, tmp_path / "x.csv")
    found = read_csv(tmp_path / "x.csv")
    assert to_csv(found) == TEXT
    assert found.seeds == (1, 2)
    assert found.policies == ("base, CFG 2",)  # the other one lacks a seed
    assert found.metrics("base, CFG 2") == ("accuracy", "fid")
    np.testing.assert_array_equal(found.values("base, CFG 2", "fid"), [1.23457e6, 2.0])
    assert missing(found) == ["base, CFG 2, accuracy, seed 1"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "line 1: expected part,seed"),
        ("a,b\n", "line 1: expected part,seed,policy,metric,value, found 'a,b'"),
        (TEXT + "llamagen,x,both,fid,1\n", "line 7: expected part.*found 'llamagen,x,both,fid,1'"),
        (TEXT + "llamagen,2,both,fid\n", "line 7: .*not enough values"),
        (TEXT + "llamagen,2,both,fid,1\n", "line 7: .*a second value of this metric"),
        (TEXT + "vqgan,2,both,recall,1\n", r"one part, found \['llamagen', 'vqgan'\]"),
        ("part,seed,policy,metric,value\n", r"one part, found \[\]"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, text: str, found: str) -> None:
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(DataError, match=found):
        read_csv(tmp_path / "x.csv")
