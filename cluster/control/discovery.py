"""Finding a run: the discovery file in its directory, and whether its driver is still alive."""

from __future__ import annotations

import json
import os
import shlex
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import ConfigError, FleetError, TesseraError, UnreachableError, did_you_mean
from cluster.io import run_layout
from cluster.io.files import replacing, writing
from cluster.io.locks import owner_of, read_lock
from cluster.io.paths import expand_user
from cluster.io.processes import process_lives
from cluster.io.run_layout import CHECKPOINTS, CONFIG, DISCOVERY_FILE, OWNER, REPORT, steps_in
from cluster.io.starts import last_ending
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
RESUME_LINE = "Go on with\n  "


class LastRunError(FleetError):
    """The requested run has ended; the message says what it left in its directory."""

    def __init__(self, message: str, directory: Path) -> None:
        super().__init__(message)
        self.directory = directory


@dataclass(frozen=True)
class RunLocation:
    """How to reach a run."""

    run: str
    """Its name; empty: the only run on the cluster."""
    address: str
    """Of its cluster, host:port or "auto"; empty: the run is starting."""
    directory: Path | None = None
    """Its directory, where known."""
    host: str = ""
    pid: int = 0
    """Host and process of the driver, from the discovery file."""
    source: str = "--address"
    """Option, variable or file that the address comes from; for messages."""
    again: str = ""
    """Shell command that continues the job after its end, where that is not `learner.run`."""

    @property
    def on_this_host(self) -> bool:
        """Whether the driver is, or was, on this host."""
        return self.host == socket.gethostname()


@contextmanager
def discovery_file(directory: Path, again: str = "") -> Iterator[Callable[[str], None]]:
    """Keep a discovery file in a run directory while the block runs. It says that the run is
    starting, until the function that this yields is called with the cluster's address.

    Args:
        again: see `RunLocation`.
    """
    file = directory / DISCOVERY_FILE

    def write(address: str) -> None:
        content = {
            "run": directory.name,
            "address": address,
            "token_authentication": shows_token(os.environ),  # known once Ray has started
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "again": again,
        }
        with writing(file), replacing(file) as partial:
            partial.write_text(dumps(content) + "\n")

    write("")
    record_run(directory)
    try:
        yield write
    finally:
        file.unlink(missing_ok=True)


def read_discovery_file(directory: Path) -> RunLocation:
    """The location of the run in a directory. Where its cluster asks for a token, this process
    will show the user's, provided that Ray has not been imported yet.

    Raises:
        LastRunError: the run has ended.
        FleetError: no run is active there, or the file is damaged.
    """
    file = directory / DISCOVERY_FILE
    try:
        found = json.loads(file.read_text())
        if found["token_authentication"]:
            os.environ.setdefault(AUTH_MODE, TOKEN_MODE)
            find_token()
        host, pid = str(found.get("host", "")), int(found.get("pid", 0))
        run, address = str(found["run"]), str(found["address"])
        check_run_name(run)
        again = str(found.get("again", ""))
        return RunLocation(run, address, directory, host, pid, str(file), again)
    except (OSError, *MALFORMED) as error:
        # Without an owner, a missing or damaged file (a power cut) is that of an ended run.
        if isinstance(error, FileNotFoundError) or not owner_of(directory):
            raise not_active_error(directory) from None
        raise FleetError(
            f"{file} cannot be read ({error}): name the cluster by --address"
        ) from None


def find_run(run: str, address: str) -> RunLocation:
    """Find a run by its name, its directory or its cluster.

    Args:
        run: its directory, or the name of a run under runs/, of one that this user started
            anywhere, or of one on the cluster. Empty: the only active one under runs/, else the
            only active one.
        address: of its cluster; empty: from the run's directory, else $RAY_ADDRESS, else the
            cluster that `ray start` started on this machine.

    Raises:
        ConfigError: the address cannot be used.
        FleetError: no active run is found, or several match.
    """
    address = address.strip()
    if address and address in PRIVATE:
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
    return _search(run)


def _search(run: str) -> RunLocation:
    """An active run by its name; empty: the default one."""
    cluster = None if run else _reachable_cluster(run)
    if cluster and cluster.source == f"${VARIABLE}":
        return cluster
    known, here = _known_runs(run), [] if run else _runs_in_roots()
    active: list[RunLocation] = []
    for path in here:
        with suppress(*[FleetError] * bool(active)):  # an unreadable one hides no newer one
            active += [location] if (location := _active_run(path)) else []
    if not active:
        others = [path for path in known if path not in here]
        active = [location for path in others if (location := _active_run(path))]
    if len(active) > 1:
        what = f"several runs named {run!r}" if run else "several runs"
        lines = [f"  --run {shlex.quote(str(location.directory))}" for location in active]
        raise FleetError("\n".join([f"{what} are active: choose one by its directory", *lines]))
    if active:
        return active[0]
    if run:  # asked only if no directory of that name is active: it may take seconds
        cluster = _reachable_cluster(run)
    if cluster:
        return cluster
    if known:
        raise _ended_error(known[0])
    searched = " or ".join(map(str, _roots()))
    hint = did_you_mean(run, [path.name for path in _known_runs("")]) if run else ""
    start = f"there is no run {run!r}" if run else "no run is active"
    raise FleetError(
        f"{start} under {searched}: {hint}one that has just been started is found once its Ray is "
        "up; name a run's directory by --run, or its cluster by --address"
    )


def _known_runs(run: str) -> list[Path]:
    """Known run directories of a name (empty: any), each once: those under the default roots, then
    the user's others, newest first."""
    unique: dict[Path, Path] = {}
    for path in (*_runs_in_roots(), *recorded_runs()):
        if run in ("", path.name):
            unique.setdefault(path.resolve(), path)
    return list(unique.values())


def _roots() -> list[Path]:
    """Default parents of run directories."""
    roots = [Path("runs")]
    with suppress(RuntimeError):  # a user without a home directory
        roots.append(Path.home() / "tessera-runs")
    return roots


def _runs_in_roots() -> list[Path]:
    """Run directories under `_roots`, the most recently started first."""

    def started(directory: Path) -> float:
        times = [os.stat(file).st_mtime for file in _marks(directory) if os.path.isfile(file)]
        return max(times, default=0.0)

    found = [path for root in _roots() for path in root.glob("*/") if holds_run(path)]
    return sorted(found, key=started, reverse=True)


def _marks(directory: Path) -> list[Path]:
    """Files that make a directory a run directory."""
    return [directory / name for name in (DISCOVERY_FILE, OWNER, CONFIG)]


def holds_run(directory: Path) -> bool:
    return any(os.path.isfile(file) for file in _marks(directory))


def _active_run(directory: Path) -> RunLocation | None:
    """The location of the run in a directory; None if it has no fleet that can be reached."""
    if not os.path.isfile(directory / DISCOVERY_FILE):
        return None
    try:
        location = read_discovery_file(directory)
    except LastRunError:
        return None
    return None if was_killed(location) else location


def _reachable_cluster(run: str) -> RunLocation | None:
    """The cluster that the environment names, else that of this machine, if it answers."""
    text, source = written_address("")
    if text and text != AUTO:
        return RunLocation(run, text, source=source)
    with suppress(TesseraError):
        if found := current_cluster():
            probe(found)
            return RunLocation(run, AUTO)
    return None


def not_on_cluster_error(run: str, error: FleetError) -> FleetError:
    """`error`, that a cluster has no such run; with what is known of an ended run of that name."""
    for path in _known_runs(run):
        if not _active_run(path):
            last = _ended_error(path)
            message = f"{error}; {last}"
            return LastRunError(message, path) if isinstance(last, LastRunError) else last
    return error


def _ended_error(directory: Path) -> FleetError:
    killed = os.path.isfile(directory / DISCOVERY_FILE)
    return killed_error(directory) if killed else not_active_error(directory)


def killed_error(directory: Path) -> FleetError:
    return LastRunError(
        f"the run in {directory} is not running any more: it was killed. {RESUME_LINE}"
        f"{_again(directory)}",
        directory,
    )


def _again(directory: Path) -> str:
    """The command that continues what was killed in a directory."""
    again = ""
    with suppress(OSError, *MALFORMED):
        again = str(json.loads((directory / DISCOVERY_FILE).read_text())["again"])
    return again or resume_command(directory)


def not_active_error(directory: Path) -> FleetError:
    """Says why no run in a directory can be reached: there never was one, it runs without Ray, or
    it has ended, with what it left."""
    if not holds_run(directory):
        return FleetError(f"{directory} holds no run: name a run, or its directory")
    if owner := owner_of(directory):
        return FleetError(
            f"the run in {directory} has no fleet that can be reached: it runs in one process "
            f"(--inline), or is about to start ({owner}). Ctrl-C there stops it, or SIGTERM to "
            "that process"
        )
    start, left = f"no run is active in {directory}: it has ended", left_behind(directory)
    if left["stage"] == "finished" and left["report"]:
        return LastRunError(f"{start}, and left {left['report']}", directory)
    newest = Path(left["checkpoint"]).name if left["checkpoint"] else "none yet"
    message = f"{start}; newest checkpoint: {newest}. {RESUME_LINE}{left['resume']}"
    return LastRunError(message, directory)


def was_killed(location: RunLocation) -> bool:
    """Whether the driver of a run is gone, as far as this machine can tell."""
    lock = read_lock(location.directory / OWNER) if location.directory else None
    if lock is not None and lock.holder is not None and lock.holder.here:
        return not lock.holder.lives
    return location.on_this_host and bool(location.pid) and not process_lives(location.pid)


def check_alive(location: RunLocation) -> None:
    """Find out within seconds whether a run can be reached; Ray itself would wait for minutes.

    Raises:
        FleetError: the run was killed, or its cluster takes no connection.
    """
    if location.directory is not None and was_killed(location):
        raise killed_error(location.directory)
    try:
        address = parse_address(location.address, location.source)
    except ConfigError:
        return  # "auto" and the like
    if address.loopback and location.host and not location.on_this_host:
        raise FleetError(
            f"the run {location.run} is on {location.host}, with a Ray that listens there alone: "
            "run this command on that machine"
        )
    try:
        probe(address)
    except UnreachableError as error:
        if location.directory is not None:
            raise killed_error(location.directory) from error
        raise


def check_run_name(name: str) -> None:
    """Refuse a name by which no run can be found, or that is a path.

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
    """The shell command that resumes a run, from any working directory."""
    return (
        f"{command_of('learner.run')} --resume --run-dir {shlex.quote(str(directory.absolute()))}"
    )


def left_behind(directory: Path) -> dict[str, str]:
    """What an ended run left: `stage` (finished, ended, killed), its newest `checkpoint`, the
    `report`, and the command to `resume` it; empty where there is none."""
    checkpoints, report = directory / CHECKPOINTS, directory / REPORT
    steps = [checkpoints / run_layout.step_name(step) for step in steps_in(checkpoints)]
    ending = last_ending(directory)
    written = report.is_file()
    if ending is None and written and steps:  # a run resumed after its end has an older report
        written = report.stat().st_mtime >= steps[-1].stat().st_mtime
    finished = written if ending is None else ending == "finished"
    killed = any(os.path.isfile(directory / name) for name in (DISCOVERY_FILE, OWNER))
    return {
        "stage": "killed" if killed or ending == "" else "finished" if finished else "ended",
        "checkpoint": str(steps[-1]) if steps else "",
        "report": str(report) if written else "",
        "resume": _again(directory) if killed else resume_command(directory),
    }
