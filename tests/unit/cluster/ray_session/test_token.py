"""The token of Ray's clusters: where it is found, and how a user without one gets one."""

from __future__ import annotations

import os
import re
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest

from cluster.errors import FleetError
from cluster.ray_session.session import RayConfig, check_ray
from cluster.ray_session.token import (
    AUTH_MODE,
    TOKEN,
    TOKEN_PATH,
    about_token,
    ensure_token,
    find_token,
    no_token,
    token,
    token_in_environment,
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (AUTH_MODE, TOKEN, TOKEN_PATH, "XDG_STATE_HOME"):
        monkeypatch.setenv(name, "")  # so that what the code sets is undone
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return home


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_a_token_is_made_where_ray_looks_for_it(home: Path) -> None:
    ensure_token()
    file = home / ".ray" / "auth_token"
    assert len(file.read_text()) == 64
    assert (mode(file), mode(file.parent)) == (0o600, 0o700)
    made = token(os.environ)
    assert made == file.read_text()
    ensure_token()
    assert token(os.environ) == made
    assert TOKEN_PATH not in os.environ
    assert [path.name for path in file.parent.iterdir()] == ["auth_token"]


def test_an_empty_file_is_no_token(home: Path) -> None:
    file = home / ".ray" / "auth_token"
    file.parent.mkdir()
    file.touch()
    assert not find_token()
    ensure_token()
    assert len(file.read_text()) == 64


@pytest.mark.parametrize("unusable", ["/proc/nowhere", "/dev/null"])
def test_a_home_that_cannot_be_written(
    unusable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token is then in a private directory of the user, and other commands find it there."""
    monkeypatch.setenv("HOME", unusable)
    (tmp_path / "tmp").mkdir()
    ensure_token()
    file = Path(os.environ[TOKEN_PATH])
    assert file.parent == tmp_path / "tmp" / f"tessera-{os.getuid()}"
    assert (mode(file), mode(file.parent)) == (0o600, 0o700)
    made = token(os.environ)
    monkeypatch.delenv(TOKEN_PATH)  # another shell
    assert token(os.environ) == ""
    assert find_token()
    assert token(os.environ) == made


def test_no_home_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", none)
    (tmp_path / "tmp").mkdir()
    ensure_token()
    assert token(os.environ)


def test_a_directory_of_somebody_else_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever makes /tmp/tessera-UID first could give this user a token that he knows."""
    monkeypatch.setenv("HOME", "/proc/nowhere")
    theirs = tmp_path / "tmp" / f"tessera-{os.getuid()}"
    theirs.mkdir(parents=True)
    theirs.chmod(0o777)
    (theirs / "auth_token").write_text("known")
    assert not find_token()
    with pytest.raises(FleetError, match="Set HOME to a directory that can"):
        ensure_token()
    elsewhere = tmp_path / "elsewhere"
    theirs.rename(elsewhere)
    elsewhere.chmod(0o700)
    theirs.symlink_to(elsewhere)
    assert not find_token()


def test_what_the_user_says_is_kept_to(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(AUTH_MODE, "disabled")
    ensure_token()
    assert not (home / ".ray").exists()
    monkeypatch.setenv(AUTH_MODE, "token")
    monkeypatch.setenv(TOKEN_PATH, str(home / "other"))
    with pytest.raises(FleetError, match=r"RAY_AUTH_TOKEN_PATH names .*other, where no token"):
        ensure_token()
    with pytest.raises(FleetError, match="where no token"):  # by a dry run, too
        check_ray(RayConfig())
    (home / "other").write_text("mine\n")
    ensure_token()
    assert token(os.environ) == "mine"
    monkeypatch.setenv(TOKEN, " ")  # Ray would not start with it, after half a minute
    with pytest.raises(FleetError, match="RAY_AUTH_TOKEN is set, and blank"):
        ensure_token()
    monkeypatch.setenv(TOKEN, "first")
    assert token(os.environ) == "first"


def test_what_is_started_has_the_token_itself(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with token_in_environment():
        assert TOKEN not in os.environ, "there is none"
    ensure_token()
    made = token(os.environ)
    with suppress(ZeroDivisionError), token_in_environment():
        (home / ".ray" / "auth_token").write_text("another cluster's")
        assert os.environ[TOKEN] == token(os.environ) == made
        raise ZeroDivisionError
    assert TOKEN not in os.environ
    assert token(os.environ) == "another cluster's"
    monkeypatch.setenv(TOKEN, "mine")
    with token_in_environment():
        assert os.environ[TOKEN] == "mine"
    assert os.environ[TOKEN] == "mine"
    monkeypatch.setenv(AUTH_MODE, "disabled")
    monkeypatch.delenv(TOKEN)
    with token_in_environment():
        assert TOKEN not in os.environ


def test_a_token_that_cannot_be_read_is_not_a_missing_one(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root, whom tests may run as, can read any file: a directory."""
    monkeypatch.setenv(AUTH_MODE, "token")
    monkeypatch.setenv(TOKEN_PATH, str(home))
    why = f"{home} cannot be read \\(Is a directory\\)"
    assert re.search(f"asks for a token, and {why}: the head's", about_token(os.environ))
    assert re.search(f"no token is found: {why}; the head's", no_token(os.environ))
    monkeypatch.setenv(TOKEN_PATH, str(home / "absent"))
    assert "there is none in" in about_token(os.environ)
