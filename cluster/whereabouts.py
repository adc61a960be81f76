"""Where a run is: the file in its directory that says so, and whether it still tells the truth."""

from __future__ import annotations

import json
import os
import shlex
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.address import VARIABLE, greet, parse_address
from cluster.errors import ConfigError, FleetError, UnreachableError
from cluster.files import replacing
from cluster.invocation import command_of
from cluster.ray_token import AUTH_MODE, TOKEN_MODE, find_token
from cluster.strict_json import dumps

WHEREABOUTS = "fleet.json"
LONGEST_NAME = 200
HINT = (
    "one that has just been started is found when its Ray is there; name another's directory by "
    "--run, or its cluster by --address"
)


@dataclass(frozen=True)
class Place:
    """Where to look for a run."""

    run: str
    """Its name; empty: the only one on the cluster."""
    address: str
    """Of its cluster, host:port or "auto"."""
    directory: Path | None = None
    """Its directory, where that is known."""
    host: str = ""
    pid: int = 0
    """Of the program that drives it, where its directory says so."""
    source: str = "--address"
    """Who says the address: an option, a variable or a file; for messages."""

    @property
    def here(self) -> bool:
        """Whether that program is, or was, on this machine."""
        return self.host == socket.gethostname()


@contextmanager
def announced(directory: Path, address: str) -> Iterator[None]:
    """While the block runs, a file in the run's directory says which cluster it is on."""
    file = directory / WHEREABOUTS
    token = os.environ.get(AUTH_MODE) == TOKEN_MODE  # Ray says so once it has turned it on
    with replacing(file) as partial:
        found = {
            "run": directory.name,
            "address": address,
            "token_authentication": token,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        partial.write_text(dumps(found) + "\n")
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def whereabouts(directory: Path) -> Place:
    """Where the run in a directory says it is. Where its cluster asks for a token, this process
    will show the user's (Ray would not by itself, for a cluster named by address); Ray must not
    have been imported yet.

    Raises:
        FleetError: nothing runs there, or the file is damaged.
    """
    file = directory / WHEREABOUTS
    try:
        found = json.loads(file.read_text())
        if found["token_authentication"]:
            os.environ.setdefault(AUTH_MODE, TOKEN_MODE)
            find_token()
        host, pid = str(found.get("host", "")), int(found.get("pid", 0))
        check_run_name(str(found["run"]))
        run, address = str(found["run"]), str(found["address"])
        return Place(run, address, directory, host, pid, str(file))
    except FileNotFoundError:
        raise FleetError(
            f"no run is active in {directory}: it has ended, or was started with --inline"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FleetError(
            f"{file} cannot be read ({error}): name the cluster by --address"
        ) from None


def locate_run(run: str, address: str) -> Place:
    """Where a run is.

    Args:
        run: its name, or its directory; empty: the newest that is active under runs/, or the only
            one on the cluster.
        address: of its cluster; empty: as its directory says, else $RAY_ADDRESS. Ray is not asked
            to look for clusters unless told to ("auto"): it would find any that runs on the
            machine, and wait for minutes for one that takes nobody in.

    Raises:
        FleetError: the directory that was named holds no active run, or there is none.
    """
    roots = [Path("runs"), Path.home() / "tessera-runs"]
    cluster, searched = os.environ.get(VARIABLE, "").strip(), " or ".join(map(str, roots))
    if address:
        name = Path(run).name
        if name:
            check_run_name(name)
        return Place(name, address)
    if run:
        there = [path for path in (Path(run), *(root / run for root in roots)) if path.is_dir()]
        if there:
            return whereabouts(there[0])
        if Path(run).name != run:
            raise FleetError(f"there is no directory {run}: name a run, or its directory")
        if not cluster:
            raise FleetError(f"there is no run {run!r} under {searched}: {HINT}")
        return Place(run, cluster, source=f"${VARIABLE}")
    if cluster:
        return Place("", cluster, source=f"${VARIABLE}")
    files = [file for root in roots for file in root.glob(f"*/{WHEREABOUTS}")]
    files.sort(key=lambda file: file.stat().st_mtime, reverse=True)
    places = [whereabouts(file.parent) for file in files]
    for place in places:
        if not was_killed(place):
            return place
    if places:
        raise killed(places[0])
    raise FleetError(f"no run is active under {searched}: {HINT}")


def was_killed(place: Place) -> bool:
    """Whether the program that drove a run is gone, as far as this machine can tell."""
    return place.here and bool(place.pid) and not process_lives(place.pid)


def check_alive(place: Place) -> None:
    """Find out quickly whether anybody can be there, before Ray waits for it, which takes minutes.

    Raises:
        FleetError: the run was killed and left its file, or its cluster takes no connection.
    """
    if was_killed(place):
        raise killed(place)
    try:
        address = parse_address(place.address, place.source)
    except ConfigError:
        return  # "auto" and the like
    if address.loopback and place.host and not place.here:
        raise FleetError(
            f"the run {place.run} is on {place.host}, with a Ray that listens there alone: run "
            "this command on that machine"
        )
    try:
        greet(address)
    except UnreachableError as error:
        if place.directory is not None:
            raise killed(place) from error
        raise


def killed(place: Place) -> FleetError:
    """That a run ended without taking its leave."""
    assert place.directory is not None
    return FleetError(
        f"the run in {place.directory} is not running any more, but left {WHEREABOUTS}: it was "
        f"killed. Go on with\n  {resume_command(place.directory)}"
    )


def check_run_name(name: str) -> None:
    """Refuse a name under which no run can be found, or that leads elsewhere as a path.

    Raises:
        ConfigError: says what is wrong with it.
    """
    odd = not name.isprintable() or any(mark in name for mark in "/\\") or name in ("", ".", "..")
    if odd or len(name) > LONGEST_NAME:
        raise ConfigError(
            f"a run is named after its directory, by at most {LONGEST_NAME} printable characters "
            f"without slashes, found {name!r}: name another --run-dir"
        )


def resume_command(directory: Path) -> str:
    return f"{command_of('learner.run')} --resume --run-dir {shlex.quote(str(directory))}"


def process_lives(pid: int) -> bool:
    """Whether a process of this machine is there; one that ended and was not waited for is not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    status = Path(f"/proc/{pid}/stat")
    return not (status.is_file() and status.read_text().rpartition(")")[2].split()[0] == "Z")


def left_behind(directory: Path) -> dict[str, Any]:
    """What a run that ended has kept: its newest checkpoint, if any, and how to go on."""
    steps = sorted((directory / "checkpoints").glob("step_*"))
    return {"checkpoint": str(steps[-1]) if steps else "", "resume": resume_command(directory)}
