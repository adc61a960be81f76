"""What may be written for a cluster's address, and what answers there: named within seconds."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.errors import ConfigError, FleetError
from cluster.ray_session.address import (
    PROBE_S,
    VARIABLE,
    Address,
    GcsAnswer,
    check_answer,
    current_cluster,
    parse_address,
    probe,
    temp_root,
    why_not_joined,
    written_address,
)
from cluster.ray_session.token import AUTH_MODE, TOKEN, TOKEN_PATH

SETTINGS = b"\0\0\0\4\0\0\0\0\0"  # an HTTP/2 server's first frame
OURS = ("2.60.0", "3.11.7")


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (VARIABLE, AUTH_MODE, TOKEN, TOKEN_PATH, "RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize(
    ("text", "host", "port", "shown"),
    [
        ("10.0.0.1:6379", "10.0.0.1", 6379, "10.0.0.1:6379"),
        (" head.cluster:1024\n", "head.cluster", 1024, "head.cluster:1024"),
        ("[fd00::1]:6379", "fd00::1", 6379, "[fd00::1]:6379"),
        ("[fe80::1%eth0]:6380", "fe80::1%eth0", 6380, "[fe80::1%eth0]:6380"),
    ],
)
def test_addresses(text: str, host: str, port: int, shown: str) -> None:
    address = parse_address(text, "--ray.address")
    assert (address.host, address.port, str(address)) == (host, port, shown)


@pytest.mark.parametrize(
    ("text", "instead"),
    [
        ("ray://head:10001", "use head:6379 .* or `ray job submit` from outside"),
        ("ray://[fd00::1]:10001", re.escape("use [fd00::1]:6379")),
        ("http://10.0.0.1:8265", "belongs into RAY_API_SERVER_ADDRESS.* is 10.0.0.1:6379"),
        ("https://ray.example.com/path", "RAY_API_SERVER_ADDRESS.* is ray.example.com:6379"),
        ("redis://head", "expected host:port, head:6379"),
        ("head", "without a port: write head:6379"),
        ("head:", "without a port: write head:6379"),
        ("[::1]", re.escape("without a port: write [::1]:6379")),
        ("::1", re.escape("in brackets, with a port: write [::1]:6379")),
        ("fd00::1:6379", re.escape("in brackets, with a port: write [fd00::1]:6379")),
        ("fd00::1:2", re.escape("write [fd00::1:2]:6379")),
        ("10.0.0.1:6379,10.0.0.2:6379", "expected one host:port"),
        ("[head]:6379", "an IPv6 address is written"),
        ("[::1]6379", "an IPv6 address is written"),
        (":6379", "expected host:port"),
        ("a head:6379", "expected host:port"),
        ("me@head:6379", "expected host:port"),
        ("head:x", "must be a number up to 65535, found 'x'"),
        ("head:0", "must be a number"),
        ("head:65536", "must be a number"),
        ("head:6379/", "must be a number"),
    ],
)
def test_what_is_no_address_says_what_to_write(text: str, instead: str) -> None:
    with pytest.raises(ConfigError, match=instead) as error:
        parse_address(text, f"${VARIABLE}")
    assert str(error.value).startswith(f"$RAY_ADDRESS is {text!r}")


def test_who_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    assert written_address("") == ("", "--ray.address")
    assert written_address("local") == ("", "--ray.address")
    assert written_address("auto") == ("auto", "--ray.address")
    monkeypatch.setenv(VARIABLE, "head:6379\n")
    assert written_address("") == ("head:6379", "$RAY_ADDRESS")
    assert written_address("auto") == ("head:6379", "$RAY_ADDRESS")
    assert written_address("other:6379") == ("other:6379", "--ray.address")
    assert written_address("local") == ("", "--ray.address")
    monkeypatch.setenv(VARIABLE, "local")
    assert written_address("") == ("", "$RAY_ADDRESS")


def test_what_ray_start_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert current_cluster(str(tmp_path)) is None
    (tmp_path / "ray_current_cluster").write_text("")
    assert current_cluster(str(tmp_path)) is None
    (tmp_path / "ray_current_cluster").write_text("10.0.0.1:6379")
    found = current_cluster(str(tmp_path))
    assert found == Address("10.0.0.1", 6379, str(tmp_path / "ray_current_cluster"))
    (tmp_path / "ray_current_cluster").write_text("nonsense")
    with pytest.raises(ConfigError, match="ray_current_cluster is 'nonsense'"):
        current_cluster(str(tmp_path))
    assert temp_root() == Path("/tmp/ray")
    monkeypatch.setenv("TMPDIR", "/scratch")
    assert temp_root() == Path("/scratch/ray")
    monkeypatch.setenv("RAY_TMPDIR", "/fast")
    assert temp_root() == Path("/fast/ray")
    assert temp_root("/mine") == Path("/mine")


@contextlib.contextmanager
def server(
    talk: Callable[[socket.socket], None], family: int = socket.AF_INET, host: str = "127.0.0.1"
) -> Iterator[int]:
    """A port at which `talk` is done with each connection."""
    listener, ended = socket.socket(family), threading.Event()
    listener.bind((host, 0))
    listener.listen()

    def answer(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            talk(connection)
            ended.wait(2 * PROBE_S)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        ended.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def test_a_grpc_server_is_let_pass() -> None:
    with server(lambda connection: connection.sendall(SETTINGS)) as port:
        probe(Address("127.0.0.1", port))
        probe(Address("localhost", port))
    with server(lambda c: c.sendall(SETTINGS), socket.AF_INET6, "::1") as port:
        probe(parse_address(f"[::1]:{port}", "--ray.address"))


def closes(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_RDWR)


def breaks_off(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()


@pytest.mark.parametrize(
    ("talk", "found"),
    [
        (lambda c: c.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "a web server listens there"),
        (lambda c: c.sendall(b"SSH-2.0-OpenSSH_9.2\r\n"), "began with b'SSH-2.0"),
        (closes, "taken and closed again|taken and broken off|reset by peer"),
        (breaks_off, "taken and broken off|closed again|reset by peer"),
        (lambda c: None, r"says nothing for 0\.5 s"),
    ],
    ids=["web", "ssh", "closes", "breaks off", "silent"],
)
def test_what_else_listens_is_named(talk: Callable[[socket.socket], None], found: str) -> None:
    with server(talk) as port, pytest.raises(FleetError, match=found) as error:
        probe(Address("127.0.0.1", port, f"${VARIABLE}"), wait_s=0.5)
    assert str(error.value).startswith(
        f"no Ray cluster answers at 127.0.0.1:{port} ($RAY_ADDRESS): "
    )
    assert str(error.value).endswith("Without a cluster: unset RAY_ADDRESS")


@pytest.mark.parametrize(
    ("source", "advice"),
    [
        (f"${VARIABLE}", "unset RAY_ADDRESS"),
        ("--ray.address", "leave out --ray.address"),
        ("/tmp/ray/ray_current_cluster", "remove /tmp/ray/ray_current_cluster"),
    ],
)
def test_where_nothing_listens(source: str, advice: str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with pytest.raises(FleetError, match=f"Connection refused.*{advice}"):
        probe(Address("127.0.0.1", port, source))


def test_an_unknown_name() -> None:
    with pytest.raises(FleetError, match=r"the name 'no-such-host\.invalid' is not known here"):
        probe(Address("no-such-host.invalid", 6379))
    with pytest.raises(FleetError, match="is not known here"):
        probe(Address("a" * 70 + ".b", 6379))  # longer than a name may be


def test_an_unresponsive_node_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*_: object, **__: object) -> None:
        time.sleep(60)

    def dropped(*_: object, timeout: float) -> None:
        time.sleep(timeout)
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", dropped)
    start = time.monotonic()
    with pytest.raises(FleetError, match=r"no connection within 0\.5 s; is the machine up"):
        probe(Address("127.0.0.1", 6379), wait_s=0.5)
    monkeypatch.setattr(socket, "getaddrinfo", slow)
    with pytest.raises(FleetError, match=r"no connection within 0\.5 s"):
        probe(Address("head", 6379), wait_s=0.5)
    assert time.monotonic() - start < 20


def check(answer: GcsAnswer) -> None:
    check_answer(answer, Address("10.0.0.1", 6379, f"${VARIABLE}"), OURS, 10.0)


def test_a_cluster_of_the_same_versions() -> None:
    check(GcsAnswer("OK", ray="2.60.0", python="3.11.7"))
    check(GcsAnswer("OK"))  # one that does not say


@pytest.mark.parametrize(
    "theirs", [("2.59.0", "3.11.7"), ("2.60.0", "3.12.1"), ("2.60.0", "3.11.9")]
)
def test_other_versions_are_one_sentence(
    theirs: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = GcsAnswer("OK", ray=theirs[0], python=theirs[1])
    with pytest.raises(FleetError, match="they must be the same") as error:
        check(answer)
    assert f"runs Ray {theirs[0]} on Python {theirs[1]}, this program Ray 2.60.0" in str(
        error.value
    )
    monkeypatch.setenv("RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL", "minor")
    if theirs[1].startswith("3.11") and theirs[0] == OURS[0]:
        check(answer)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (GcsAnswer("UNIMPLEMENTED"), "Ray Client's port is 10001"),
        (GcsAnswer("DEADLINE_EXCEEDED"), "does not answer within 10 s: it hangs or is overloaded"),
        (GcsAnswer("UNAVAILABLE", "Socket closed"), "Socket closed"),
    ],
)
def test_other_answers(answer: GcsAnswer, said: str) -> None:
    with pytest.raises(FleetError, match=said) as error:
        check(answer)
    assert "10.0.0.1:6379 ($RAY_ADDRESS)" in str(error.value)


def test_a_cluster_that_asks_for_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of: not shown and not there, not shown but there, shown and wrong, wanted and absent."""

    def refused() -> str:
        with pytest.raises(FleetError, match="asks for a token") as error:
            check(GcsAnswer("UNAUTHENTICATED", "InvalidAuthToken"))
        return str(error.value)

    file = tmp_path / ".ray" / "auth_token"
    copied = f"(`ray get-auth-token` there prints it) must be copied to {file}"
    assert "shows none: set RAY_AUTH_MODE=token" in refused()
    assert copied in refused()
    file.parent.mkdir()
    file.write_text("abc\n")
    assert f"set RAY_AUTH_MODE=token; it is then read from {file}" in refused()
    monkeypatch.setenv(AUTH_MODE, "Token")
    assert f"refuses the one in {file}: the head's" in refused()
    monkeypatch.setenv(TOKEN_PATH, "/nowhere/token")
    assert "there is none in /nowhere/token" in refused()
    monkeypatch.setenv(TOKEN, "abc")
    assert "refuses the one in $RAY_AUTH_TOKEN" in refused()
    assert "abc" not in refused()


def test_what_ray_says_when_it_does_not_join() -> None:
    """One sentence, however Ray wraps it; a machine that is no node of the cluster is told so."""
    address = Address("10.0.0.1", 6379, f"${VARIABLE}")
    inner = RuntimeError(
        "Failed to connect to GCS. Last: Traceback (most recent call last):\n  File x\n    y()\n"
        "ray.exceptions.RpcError: Timed out\n"
    )
    outer = ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379")
    outer.__cause__ = inner
    assert why_not_joined(outer, address) == (
        "cannot join the Ray cluster at 10.0.0.1:6379 ($RAY_ADDRESS): Failed to connect to Ray "
        "cluster at 10.0.0.1:6379: Failed to connect to GCS. Last: ray.exceptions.RpcError: Timed "
        "out"
    )
    outer.__cause__ = RuntimeError("No node info found matching attributes: '' when trying")
    assert "start one here by `ray start --address=10.0.0.1:6379`" in why_not_joined(outer, address)
