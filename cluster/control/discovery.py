"""Where a run is: the file in its directory that says so, and whether it still tells the truth."""

from __future__ import annotations

import json
import os
import shlex
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.errors import ConfigError, FleetError, TesseraError, UnreachableError, did_you_mean
from cluster.io import run_layout
from cluster.io.files import replacing, writing
from cluster.io.locks import owner_of, read_lock
from cluster.io.paths import expand_user
from cluster.io.processes import process_lives
from cluster.io.run_layout import CHECKPOINTS, CONFIG, DISCOVERY_FILE, OWNER, REPORT, steps_in
from cluster.io.strict_json import MALFORMED, dumps
from cluster.io.user_files import record_run, recorded_runs
from cluster.program.invocation import command_of
from cluster.ray_session.address import (
    AUTO,
    PRIVATE,
    VARIABLE,
    current_cluster,
    parse_address,
    probe,
    written_address,
)
from cluster.ray_session.token import AUTH_MODE, TOKEN_MODE, find_token, shows_token

LONGEST_NAME = 200
START_HINT = (
    "one that has just been started is found when its Ray is there; name another's directory by "
    "--run, or its cluster by --address"
)


class LastRunError(FleetError):
    """The run that is meant is not active any more; says what it left."""

    def __init__(self, message: str, directory: Path) -> None:
        super().__init__(message)
        self.directory = directory


@dataclass(frozen=True)
class RunLocation:
    """Where to look for a run."""

    run: str
    """Its name; empty: the only one on the cluster."""
    address: str
    """Of its cluster, host:port or "auto"; empty: the run is starting."""
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
def discovery_file(directory: Path) -> Iterator[Callable[[str], None]]:
    """While the block runs, a file in the run's directory says that it starts; and on which cluster
    it is, once the function that this yields was given the address."""
    file = directory / DISCOVERY_FILE

    def at(address: str) -> None:
        found = {
            "run": directory.name,
            "address": address,
            "token_authentication": shows_token(os.environ),  # Ray says so once it has turned it on
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        with writing(file), replacing(file) as partial:
            partial.write_text(dumps(found) + "\n")

    at("")
    record_run(directory)
    try:
        yield at
    finally:
        file.unlink(missing_ok=True)


def read_discovery_file(directory: Path) -> RunLocation:
    """Where the run in a directory says it is. Where its cluster asks for a token, this process
    will show the user's (Ray would not by itself, for a cluster named by address); Ray must not
    have been imported yet.

    Raises:
        LastRunError: the run there has ended.
        FleetError: nothing runs there, or the file is damaged.
    """
    file = directory / DISCOVERY_FILE
    try:
        found = json.loads(file.read_text())
        if found["token_authentication"]:
            os.environ.setdefault(AUTH_MODE, TOKEN_MODE)
            find_token()
        host, pid = str(found.get("host", "")), int(found.get("pid", 0))
        check_run_name(str(found["run"]))
        run, address = str(found["run"]), str(found["address"])
        return RunLocation(run, address, directory, host, pid, str(file))
    except FileNotFoundError:
        raise not_active_error(directory) from None
    except (OSError, *MALFORMED) as error:
        if not owner_of(directory):  # of a run that a power cut ended, say
            raise not_active_error(directory) from None
        raise FleetError(
            f"{file} cannot be read ({error}): name the cluster by --address"
        ) from None


def find_run(run: str, address: str) -> RunLocation:
    """Where a run is.

    Args:
        run: its directory, or its name: of one under runs/, of one that this user started from
            anywhere, or of one on the cluster. Empty: the newest that is active under runs/, else
            the only active one.
        address: of its cluster; empty: as its directory says, else $RAY_ADDRESS, else the cluster
            that `ray start` started on this machine.

    Raises:
        ConfigError: the address stands for none.
        FleetError: the directory that was named holds no active run, there is none, or several
            have the name.
    """
    address = address.strip()
    if address in PRIVATE and address:
        raise ConfigError(
            f"--address is {address!r}, which no other command can reach: leave it out, and name a "
            "run of its own Ray by --run"
        )
    if address:
        name = Path(run).name
        if name:
            check_run_name(name)
        return RunLocation(name, address)
    run = str(expand_user(run)) if run.startswith("~") else run
    if run and (Path(run).name != run or holds_run(Path(run))):
        if not os.path.isdir(run):
            raise FleetError(f"there is no directory {run}: name a run, or its directory")
        return read_discovery_file(Path(run))
    return _named(run) if run else _newest()


def _directories(run: str) -> list[Path]:
    """Directories of runs of a name (empty: any) that are known, newest first; each once."""
    there = [path for path in (*_under_roots(), *recorded_runs()) if run in ("", path.name)]
    return list({path.resolve(): path for path in reversed(there)}.values())[::-1]


def not_on_cluster_error(run: str, error: FleetError) -> FleetError:
    """That a cluster has no such run, and what is known of one of the name that has ended."""
    for path in _directories(run):
        if not _living(path):
            last = _ended_place(path)
            message = f"{error}; {last}"
            return LastRunError(message, path) if isinstance(last, LastRunError) else last
    return error


def _named(run: str) -> RunLocation:
    """The run of a name."""
    there = _directories(run)
    living = [place for path in there if (place := _living(path))]
    if len(living) > 1:
        raise FleetError(_several(f"several runs named {run!r} are active", living))
    if living:
        return living[0]
    if cluster := _cluster_here():
        return replace(cluster, run=run)
    if there:
        raise _ended_place(there[0])
    hint = did_you_mean(run, [path.name for path in _directories("")])
    raise FleetError(f"there is no run {run!r} under {_searched()}: {hint}{START_HINT}")


def _newest() -> RunLocation:
    """The run that is meant where none is named."""
    cluster = _cluster_here()
    if cluster and cluster.source == f"${VARIABLE}":
        return cluster
    ours = _under_roots()
    for path in ours:
        if place := _living(path):
            return place
    others = [path for path in recorded_runs() if path not in ours]
    living = [place for path in others if (place := _living(path))]
    if len(living) > 1:
        raise FleetError(_several("several runs are active", living))
    if living:
        return living[0]
    if cluster:
        return cluster
    if ours or others:
        raise _ended_place((ours or others)[0])
    raise FleetError(f"no run is active under {_searched()}: {START_HINT}")


def _roots() -> list[Path]:
    """Where runs lie that were given no directory of their own."""
    roots = [Path("runs")]
    with suppress(RuntimeError):  # a user without a home directory
        roots.append(Path.home() / "tessera-runs")
    return roots


def _searched() -> str:
    return " or ".join(map(str, _roots()))


def _under_roots() -> list[Path]:
    """Directories of runs under `_roots`, those that were started last first."""
    found = [path for root in _roots() for path in root.glob("*/") if holds_run(path)]
    return sorted(found, key=_started, reverse=True)


def _started(directory: Path) -> float:
    """About when a run began, or was gone on with; for comparisons."""
    times = [os.stat(file).st_mtime for file in _marks(directory) if os.path.isfile(file)]
    return max(times, default=0.0)


def _marks(directory: Path) -> list[Path]:
    """The files of which a directory of a run has one."""
    return [directory / name for name in (DISCOVERY_FILE, OWNER, CONFIG)]


def holds_run(directory: Path) -> bool:
    return any(os.path.isfile(file) for file in _marks(directory))


def _living(directory: Path) -> RunLocation | None:
    """Where an active run is; None if its fleet cannot be spoken with."""
    if not os.path.isfile(directory / DISCOVERY_FILE):
        return None
    try:
        place = read_discovery_file(directory)
    except LastRunError:
        return None
    return None if was_killed(place) else place


def _cluster_here() -> RunLocation | None:
    """Where a run may be whose directory is not known: on the cluster that the environment names,
    or else on that of this machine."""
    text, source = written_address("")
    if text and text != AUTO:
        return RunLocation("", text, source=source)
    with suppress(TesseraError):
        if found := current_cluster():
            probe(found)
            return RunLocation("", AUTO, source="--address")
    return None


def _several(what: str, places: list[RunLocation]) -> str:
    lines = [f"  --run {shlex.quote(str(place.directory))}" for place in places]
    return "\n".join([f"{what}: choose one by its directory", *lines])


def _ended_place(directory: Path) -> FleetError:
    """That the last run there was is not active any more."""
    if os.path.isfile(directory / DISCOVERY_FILE):
        return killed_error(read_discovery_file(directory))
    return not_active_error(directory)


def not_active_error(directory: Path) -> FleetError:
    """That a directory has no run that can be spoken with: it never held one, it runs without Ray,
    or it has ended, with what it kept."""
    if not holds_run(directory):
        return FleetError(f"{directory} holds no run: name a run, or its directory")
    if owner := owner_of(directory):
        return FleetError(
            f"the run in {directory} has no fleet to speak with: it runs in one process "
            f"(--inline), or is about to start ({owner}). Ctrl-C there stops it, or SIGTERM to "
            "that process"
        )
    start, left = f"no run is active in {directory}: it has ended", left_behind(directory)
    if left["report"]:
        return LastRunError(f"{start}, and left {left['report']}", directory)
    newest = Path(left["checkpoint"]).name if left["checkpoint"] else "none yet"
    said = f"{start}; newest checkpoint: {newest}. Go on with\n  {left['resume']}"
    return LastRunError(said, directory)


def was_killed(place: RunLocation) -> bool:
    """Whether the program that drove a run is gone, as far as this machine can tell."""
    sight = read_lock(place.directory / OWNER) if place.directory else None
    if sight is not None and sight.holder is not None and sight.holder.here:
        return not sight.holder.lives
    return place.here and bool(place.pid) and not process_lives(place.pid)


def check_alive(place: RunLocation) -> None:
    """Find out quickly whether anybody can be there, before Ray waits for it, which takes minutes.

    Raises:
        FleetError: the run was killed and left its file, or its cluster takes no connection.
    """
    if was_killed(place):
        raise killed_error(place)
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
        probe(address)
    except UnreachableError as error:
        if place.directory is not None:
            raise killed_error(place) from error
        raise


def killed_error(place: RunLocation) -> FleetError:
    """That a run ended without taking its leave."""
    assert place.directory is not None
    return LastRunError(
        f"the run in {place.directory} is not running any more: it was killed. Go on with\n"
        f"  {resume_command(place.directory)}",
        place.directory,
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
    """What to type to go on with a run, in a shell and from any working directory."""
    return (
        f"{command_of('learner.run')} --resume --run-dir {shlex.quote(str(directory.absolute()))}"
    )


def still_starting(place: RunLocation) -> str:
    """That the program of a run is there, and its workers are not yet."""
    return (
        f"the run {place.run} is starting (process {place.pid} on {place.host}): its workers are "
        "not there yet"
    )


def left_behind(directory: Path) -> dict[str, str]:
    """How a run ended, its newest checkpoint, the report of one that came to its end, and how to go
    on; empty where there is none."""
    checkpoints, report = directory / CHECKPOINTS, directory / REPORT
    steps = [checkpoints / run_layout.step_name(step) for step in steps_in(checkpoints)]
    finished = report.is_file()
    if finished and steps:  # one that was gone on with after its end has an older report
        finished = report.stat().st_mtime >= steps[-1].stat().st_mtime
    killed = any(os.path.isfile(directory / name) for name in (DISCOVERY_FILE, OWNER))
    return {
        "stage": "killed" if killed else "finished" if finished else "ended",
        "checkpoint": str(steps[-1]) if steps else "",
        "report": str(report) if finished else "",
        "resume": resume_command(directory),
    }
