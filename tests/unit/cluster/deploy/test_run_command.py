"""The command line of a run, through the shells of `ray job submit`."""

from __future__ import annotations

import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.deploy.run_command import for_job_submit
from cluster.errors import ConfigError

HARD = [
    "plain", "--sampler.labels", "market=in(a,b)", "zone=!spot", "a photo of a {}", "it's",
    'say "x"',
    "$HOME", "a $HOME b", "`x`", "back\\slash", "a b\\", "semi;colon", "a&b|c", "*", "~", "#x", "",
    "tab\there", 'both \' and "', "100%", "{a,b}",
]  # fmt: skip


def through_job_submit(entrypoint: str, shell: str = "sh") -> list[str]:
    """The words that arrive, as in a KubeRay job: bash reads the script, `ray job submit` joins the
    words, a shell runs the result."""

    def read(by: str, line: str) -> list[str]:
        command = [by, "-c", f"printf '%s\\0' {line}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split(
            "\0"
        )[:-1]

    return read(shell, subprocess.list2cmdline(read("bash", entrypoint)))


@pytest.mark.parametrize("shell", ["bash", "sh"])
def test_arguments_get_through_real_shells(shell: str) -> None:
    assert through_job_submit(for_job_submit(HARD), shell) == HARD


WORDS = st.lists(
    st.text(st.characters(codec="ascii", categories=["L", "P", "S", "Zs"]), max_size=9), min_size=1
)


@settings(max_examples=60, deadline=None)
@given(WORDS)
def test_any_arguments_get_through(words: list[str]) -> None:
    assert through_job_submit(for_job_submit(words)) == words


def test_line_breaks_are_refused() -> None:
    with pytest.raises(ConfigError, match="several lines"):
        for_job_submit(["python", "two\nlines"])
