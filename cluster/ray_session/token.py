"""Ray's authentication token: where it is read, how a private Ray gets one, and messages for a
cluster that refuses it.

With RAY_AUTH_MODE=token, Ray sends the token of $RAY_AUTH_TOKEN, of the file
$RAY_AUTH_TOKEN_PATH, or of ~/.ray/auth_token.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from cluster.errors import FleetError
from cluster.io.processes import in_environment
from cluster.io.user_files import is_private_directory, user_directories

AUTH_MODE, TOKEN_MODE = "RAY_AUTH_MODE", "token"
TOKEN, TOKEN_PATH = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
FILE = Path(".ray", "auth_token")  # below the home directory


def shows_token(environment: Mapping[str, str]) -> bool:
    """Whether Ray sends a token to a cluster that it joins."""
    return environment.get(AUTH_MODE, "").lower() == TOKEN_MODE


def wants_token(environment: Mapping[str, str]) -> bool:
    """Whether a private Ray asks for a token, the default."""
    return environment.get(AUTH_MODE, TOKEN_MODE).lower() == TOKEN_MODE


def token(environment: Mapping[str, str]) -> str:
    """The token that Ray would send; empty without one."""
    if environment.get(TOKEN):
        return environment[TOKEN].strip()
    file = token_file(environment)
    try:
        return file.read_text().strip() if file else ""
    except (OSError, UnicodeDecodeError):
        return ""


def token_file(environment: Mapping[str, str]) -> Path | None:
    """The token's file; None without a home directory."""
    if environment.get(TOKEN_PATH):
        return Path(environment[TOKEN_PATH])
    try:
        return Path.home() / FILE
    except RuntimeError:
        return None


def check_token(environment: Mapping[str, str]) -> None:
    """Check that the token that the environment names for a private Ray exists.

    Raises:
        FleetError: it does not.
    """
    if not wants_token(environment) or token(environment):
        return
    if environment.get(TOKEN):
        raise FleetError(f"{TOKEN} is set, and blank: put a token there, or unset {TOKEN}")
    if environment.get(TOKEN_PATH):
        raise FleetError(
            f"{TOKEN_PATH} names {environment[TOKEN_PATH]}, where no token can be read: put one "
            f"there (`ray get-auth-token --generate` prints one), or unset {TOKEN_PATH}"
        )


def ensure_token() -> None:
    """Create a token for a private Ray if there is none: in ~/.ray/auth_token, else in one of
    `user_directories`, where other commands of this user find it.

    Raises:
        FleetError: `check_token` refuses, or no private directory is writable.
    """
    check_token(os.environ)
    if not wants_token(os.environ) or find_token():
        return
    standard = token_file(os.environ)
    for file in (*([standard] if standard else []), *_own_token_files()):
        with suppress(OSError):
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if file != standard and not is_private_directory(file.parent):
                continue
            _make_token(file)
            find_token()
            return
    raise FleetError(
        "there is no place for the token that a private Ray asks for: neither the home directory "
        f"nor {tempfile.gettempdir()} can be written. Set HOME to a directory that can"
    )


def _make_token(file: Path) -> None:
    """Write a new token that only the user can read; a file that appears meanwhile is kept."""
    partial = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
            opened.write(secrets.token_hex(32))
        if file.exists() and not file.stat().st_size:
            file.unlink()
        with suppress(FileExistsError):
            os.link(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def find_token() -> bool:
    """Whether this user has a token; sets $RAY_AUTH_TOKEN_PATH if Ray would not find it."""
    if token(os.environ):
        return True
    if os.environ.get(TOKEN_PATH):
        return False
    for file in _own_token_files():
        with suppress(OSError):
            if is_private_directory(file.parent) and file.stat().st_size:
                os.environ[TOKEN_PATH] = str(file)
                return True
    return False


@contextmanager
def token_in_environment() -> Iterator[None]:
    """Put the token into the environment while the block runs. A private Ray that starts in it
    keeps the token for later workers, even if the file changes."""
    known = token(os.environ)
    with in_environment(TOKEN, known) if wants_token(os.environ) and known else nullcontext():
        yield


def _own_token_files() -> list[Path]:
    return [directory / FILE.name for directory in user_directories()]


def _token_place(environment: Mapping[str, str]) -> str:
    file = token_file(environment)
    return f"${TOKEN}" if environment.get(TOKEN) else str(file or f"${TOKEN_PATH}")


def _absent(environment: Mapping[str, str]) -> str:
    """Why there is no token where Ray looks for it, for messages."""
    place, file = _token_place(environment), token_file(environment)
    if not environment.get(TOKEN) and file is not None:
        try:
            file.read_text()
        except FileNotFoundError:
            pass
        except (OSError, UnicodeDecodeError) as error:
            return f"{place} cannot be read ({getattr(error, 'strerror', None) or error})"
    return f"there is none in {place}"


def _copied(environment: Mapping[str, str]) -> str:
    """How to copy a cluster's token, for messages."""
    return (
        "the head's (`ray get-auth-token` there prints it) must be copied to "
        f"{token_file(environment) or '~/.ray/auth_token'}, or to a file that {TOKEN_PATH} names, "
        "on every machine"
    )


def about_token(environment: Mapping[str, str]) -> str:
    """Message: why a cluster refuses this program, and how to get the right token."""
    place, known = _token_place(environment), token(environment)
    if shows_token(environment):
        what = f"refuses the one in {place}" if known else _absent(environment)
        return f"asks for a token, and {what}: {_copied(environment)}"
    there = f"it is then read from {place}" if known else _copied(environment)
    return f"asks for a token, and this program shows none: set {AUTH_MODE}={TOKEN_MODE}; {there}"


def no_token(environment: Mapping[str, str]) -> str:
    """Message: Ray should send a token, and there is none."""
    return (
        f"{AUTH_MODE}={TOKEN_MODE} is set, and no token is found: {_absent(environment)}; "
        f"{_copied(environment)}"
    )
