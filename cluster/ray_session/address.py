"""Addresses of Ray clusters: parsing, and probing within seconds what answers there. (Ray itself
waits for minutes for a missing cluster.)
"""

from __future__ import annotations

import ipaddress
import os
import pwd
import queue
import socket
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from cluster.errors import ConfigError, FleetError, UnreachableError
from cluster.ray_session.token import about_token

VARIABLE = "RAY_ADDRESS"
OPTION = "--ray.address"
AUTO, PRIVATE = "auto", ("", "local")
PORT = 6379  # default of `ray start --head`
CURRENT_CLUSTER = "ray_current_cluster"  # `ray start` leaves its address there
PROBE_S = 3.0  # longest wait for a connection, and for its first bytes
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
"""First bytes of a gRPC client: HTTP/2's preface and an empty SETTINGS frame."""
SETTINGS = 4  # type of a gRPC server's first frame (RFC 9113)


@dataclass(frozen=True)
class Address:
    """Address of a Ray cluster."""

    host: str
    """Host name, or IPv4 or IPv6 address without brackets."""
    port: int
    source: str = OPTION
    """Option, variable or file that it comes from; for messages."""
    user: int | None = field(default=None, compare=False)
    """Id of the user who wrote it into a file of this machine."""

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def loopback(self) -> bool:
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    return host in ("localhost", "::1", "[::1]") or host.startswith("127.")


def parse_address(text: str, source: str) -> Address:
    """Parse the address of a cluster, host:port.

    Args:
        source: the option or variable that has it, for the error.

    Raises:
        ConfigError: says what is wrong, and what to write instead.
    """
    text = text.strip()
    start = f"{source} is {text!r}"
    if "://" in text:
        raise ConfigError(f"{start}, {_of_scheme(text)}")
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or not _is_ipv6(host) or (rest and not rest.startswith(":")):
            raise ConfigError(f"{start}: an IPv6 address is written [address]:port, [::1]:{PORT}")
        port = rest[1:]
    elif text.count(":") > 1:
        raise ConfigError(f"{start}: {_of_colons(text)}")
    else:
        host, _, port = text.partition(":")
    if not host or any(mark.isspace() or mark in "/@\\" for mark in host):
        raise ConfigError(f"{start}: expected host:port, as `ray start --head` prints it")
    if not port:
        whole = f"[{host}]" if ":" in host else host
        raise ConfigError(
            f"{start}, without a port: write {whole}:{PORT}, which is the port of `ray start "
            "--head` unless it is given another"
        )
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
        raise ConfigError(f"{start}: the port must be a number up to 65535, found {port!r}")
    return Address(host, int(port), source)


def _of_colons(text: str) -> str:
    """What to write instead of several colons without brackets."""
    host, _, last = text.rpartition(":")
    if _is_ipv6(host) and last.isdecimal() and 1024 <= int(last) < 1 << 16:  # meant as a port
        whole = f"[{host}]:{last}"
    elif _is_ipv6(text):
        whole = f"[{text}]:{PORT}"
    else:
        return f"expected one host:port (an IPv6 address in brackets, as in [::1]:{PORT})"
    return f"an IPv6 address is written in brackets, with a port: write {whole}"


def _of_scheme(text: str) -> str:
    """What to write instead of a URL."""
    scheme, _, rest = text.partition("://")
    host = rest.partition("/")[0]
    host = host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
    instead = f"{host or 'host'}:{PORT}"
    if scheme == "ray":
        return (
            "an address of Ray Client, through which no run can be driven: use "
            f"{instead} (the cluster's own port, as `ray start --head` prints it) on a machine of "
            "the cluster, or `ray job submit` from outside"
        )
    if scheme in ("http", "https"):
        return (
            "an address of the dashboard, where jobs are submitted: it belongs into "
            f"RAY_API_SERVER_ADDRESS, for `ray job`; the cluster's own is {instead}, as `ray start "
            "--head` prints it"
        )
    return f"a URL: expected host:port, {instead}, as `ray start --head` prints it"


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.partition("%")[0]).version == 6
    except ValueError:
        return False


def written_address(option: str, source: str = OPTION) -> tuple[str, str]:
    """(address, its source) as the user gave it: an option, else $RAY_ADDRESS, which also resolves
    "auto"; an empty address: a private Ray."""
    text, variable = option.strip(), os.environ.get(VARIABLE, "").strip()
    if variable and text in ("", AUTO):
        text, source = variable, f"${VARIABLE}"
    return ("", source) if text in PRIVATE else (text, source)


def current_cluster(temp_dir: str = "") -> Address | None:
    """The cluster that `ray start` last started on this machine, from the file that it writes.

    Raises:
        ConfigError: the file does not hold an address.
    """
    file = temp_root(temp_dir) / CURRENT_CLUSTER
    try:
        text, user = file.read_text().strip(), file.stat().st_uid
    except OSError:
        return None
    return replace(parse_address(text, str(file)), user=user) if text else None


def temp_root(temp_dir: str = "") -> Path:
    """Directory of Ray's sessions, logs and sockets on this machine."""
    if temp_dir:
        return Path(temp_dir)
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp") / "ray"


def probe(address: Address, *, wait_s: float = PROBE_S) -> None:
    """Check that a gRPC server answers at an address.

    Raises:
        UnreachableError: no connection.
        FleetError: something other than a gRPC server answers; says what.
    """
    start = f"no Ray cluster answers at {address} ({address.source})"
    try:
        connection = _connected(address, wait_s)
    except socket.gaierror as error:
        raise UnreachableError(
            f"{start}: the name {address.host!r} is not known here ({error})"
        ) from None
    except TimeoutError:
        raise UnreachableError(
            f"{start}: no connection within {wait_s:g} s; is the machine up, and does a firewall "
            f"let this one reach it? {_otherwise(address)}"
        ) from None
    except OSError as error:
        raise UnreachableError(
            f"{start}: {error.strerror or error}. Is the cluster still up, and is that the address "
            f"that `ray start --head` printed? {_otherwise(address)}"
        ) from None
    with connection:
        try:
            connection.settimeout(wait_s)
            connection.sendall(PREFACE)
            answer = connection.recv(64)
            found = _instead(answer)
        except TimeoutError:
            found = (
                f"something takes the connection, and says nothing for {wait_s:g} s: a cluster "
                "that hangs (look at its head, and start it again), or no cluster"
            )
        except OSError as error:
            found = f"the connection was taken and broken off ({error.strerror or error})"
    if found:
        raise FleetError(f"{start}: {found}. {_otherwise(address)}")


def _instead(answer: bytes) -> str:
    """Guesses the kind of server from its first bytes; empty: gRPC."""
    if len(answer) > 3 and answer[3] == SETTINGS and not answer.startswith(b"HTTP"):
        return ""
    if answer.startswith(b"HTTP/"):
        return (
            "a web server listens there (the dashboard's port is 8265; the cluster's is "
            f"{PORT}, unless `ray start --head` was given another)"
        )
    if not answer:
        return "the connection was taken and closed again: that is no cluster"
    return f"another program listens there, which began with {answer[:16]!r}"


def _otherwise(address: Address) -> str:
    """How to go on without this address."""
    if address.source == f"${VARIABLE}":
        return f"Without a cluster: unset {VARIABLE}"
    if address.source == OPTION:
        return f"Without a cluster: leave out {OPTION}"
    if address.source.endswith(CURRENT_CLUSTER):
        return f"If that cluster has ended, remove {address.source}, or `ray start --head` anew"
    return "Is it the run's cluster?"


def _connected(address: Address, wait_s: float) -> socket.socket:
    """A connection; name lookup and attempts together take `wait_s` at most."""
    deadline = time.monotonic() + wait_s
    error: OSError = TimeoutError()
    for *_, place in _looked_up(address, wait_s):
        left = deadline - time.monotonic()
        if left <= 0:
            break
        try:
            return socket.create_connection(place[:2], timeout=left)
        except OSError as found:
            error = found
    raise error


def _looked_up(address: Address, wait_s: float) -> list[tuple]:
    """`socket.getaddrinfo` with a timeout."""
    answers: queue.Queue[list[tuple] | OSError] = queue.Queue()

    def look() -> None:
        try:
            answers.put(socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            answers.put(error if isinstance(error, OSError) else socket.gaierror(str(error)))

    threading.Thread(target=look, daemon=True).start()
    try:
        found = answers.get(timeout=wait_s)
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(found, OSError):
        raise found
    return found


@dataclass(frozen=True)
class GcsAnswer:
    """Answer of a cluster's control service (Ray's GCS) to a request for its versions."""

    code: str
    """Name of gRPC's status: "OK", "UNAUTHENTICATED", ..."""
    details: str = ""
    ray: str = ""
    """Version of Ray; empty: unknown."""
    python: str = ""
    private: bool = False
    """Whether `ray.init` started it, for one program."""


def check_answer(answer: GcsAnswer, address: Address, ours: tuple[str, str], wait_s: float) -> None:
    """Check that a cluster which gave this answer accepts this program.

    Args:
        ours: this program's versions of Ray and Python.
        wait_s: the timeout of the request, for messages.

    Raises:
        FleetError: it does not; says why, and what to do.
    """
    start = f"the Ray cluster at {address} ({address.source})"
    if answer.code == "UNAUTHENTICATED":
        raise FleetError(f"{start} {about_token(os.environ)}")
    if answer.code == "UNIMPLEMENTED":
        raise FleetError(
            f"no Ray cluster answers at {address} ({address.source}): a gRPC server listens there, "
            "but not a cluster's control service. (Ray Client's port is 10001; the cluster's is "
            f"{PORT}, unless `ray start --head` was given another.) {_otherwise(address)}"
        )
    if answer.code == "DEADLINE_EXCEEDED":
        raise FleetError(
            f"{start} takes connections, but its control service does not answer within {wait_s:g} "
            "s: it hangs or is overloaded (gcs_server.out in the logs of its head says more). "
            f"{_otherwise(address)}"
        )
    if answer.code != "OK":
        why = answer.details or answer.code
        raise FleetError(
            f"no Ray cluster answers at {address} ({address.source}): {why}. {_otherwise(address)}"
        )
    if answer.ray and not _same_versions((answer.ray, answer.python), ours):
        raise FleetError(
            f"{start} runs Ray {answer.ray} on Python {answer.python}, this program Ray {ours[0]} "
            f"on Python {ours[1]}, and they must be the same: start both from the same environment"
        )


def _same_versions(theirs: tuple[str, str], ours: tuple[str, str]) -> bool:
    """By the rule of Ray's own check."""
    level = os.environ.get("RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL", "patch")
    parts = 2 if level == "minor" else 3
    pythons = [version.split(".")[:parts] for version in (theirs[1], ours[1])]
    return theirs[0] == ours[0] and pythons[0] == pythons[1]


def no_node_here(address: Address) -> str:
    """Message: a driver needs a node of the cluster on its machine."""
    return (
        f"the Ray cluster at {address} ({address.source}) has no node on this machine, and a run "
        f"is driven from a node: start one here by `ray start --address={address}`, or run on the "
        "cluster by `ray job submit`"
    )


def not_your_node(address: Address, socket: Path) -> str:
    """Message: a driver cannot use the node of another user."""
    try:
        whose = f"belongs to {user_name(socket.stat().st_uid)}"
    except OSError:
        whose = "keeps its files where this program does not see them (a container?)"
    return (
        f"the node of the Ray cluster at {address} ({address.source}) on this machine {whose}, and "
        f"its socket {socket} cannot be opened by {user_name(os.getuid())}: run on the cluster by "
        "`ray job submit`, as that user, or on a cluster of your own"
    )


def user_name(user: int) -> str:
    """A user of this machine, for messages."""
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:  # known by number alone, as in containers
        return f"user {user}"


def why_not_joined(error: BaseException, address: Address) -> str:
    """Message for an error of `ray.init` with a cluster that answered before."""
    chain: list[str] = []
    each: BaseException | None = error
    while each is not None:
        before, traceback, inside = str(each).partition("Traceback (most recent call last)")
        if traceback:
            before += inside.strip().rpartition("\n")[2]
        text = " ".join(before.split()) or type(each).__name__
        if text not in chain:
            chain.append(text)
        each = each.__cause__
    if any("No node info found" in text for text in chain):
        return no_node_here(address)
    return f"cannot join the Ray cluster at {address} ({address.source}): {': '.join(chain)}"
