"""The network itself: addresses, limits, cuts, own folders and processes; nothing stays."""

from __future__ import annotations

import glob
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.distributed.hosts.network import ROOT, Host, Network, Program, why_not

PORT = 4000
LISTEN = """
import socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
with socket.create_server((sys.argv[1], int(sys.argv[2])), family=family) as server:
    print("listening", flush=True)
    while True:
        connection, _ = server.accept()
        while connection.recv(1 << 20):
            pass
        connection.sendall(b"all")
        connection.close()
"""
SEND = """
import socket, sys, time
with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=float(sys.argv[4])) as wire:
    start = time.perf_counter()
    wire.sendall(bytes(int(sys.argv[3])))
    wire.shutdown(socket.SHUT_WR)
    assert wire.recv(3) == b"all"
    print(time.perf_counter() - start)
"""


def listen(host: Host) -> Program:
    line = [sys.executable, "-c", LISTEN, host.address, str(PORT)]
    program = host.popen(line, stdout=subprocess.PIPE)
    assert program.stdout is not None
    assert program.stdout.readline() == "listening\n"
    return program


def send(host: Host, to: str, count: int = 1, timeout: float = 30) -> subprocess.CompletedProcess:
    return host.run([sys.executable, "-c", SEND, to, str(PORT), str(count), str(timeout)])


def text(host: Host, *command: str) -> str:
    done = host.run(command)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def receiver(network: Network) -> Host:
    listen(network.hosts[1])
    return network.hosts[1]


def test_hosts_reach_each_other_by_address_and_by_name(network: Network, receiver: Host) -> None:
    for host in [*network.hosts, network.outside]:
        for name in (receiver.address, receiver.name):
            done = send(host, name)
            assert done.returncode == 0, done.stderr
    assert "refused" in send(network.outside, network.hosts[2].address).stderr


@pytest.mark.parametrize("megabits", [100, 400])
def test_a_limit_holds_both_ways_and_bytes_are_counted(
    network: Network, receiver: Host, megabits: int
) -> None:
    sender, count = network.hosts[0], megabits * 125_000  # of a second
    for limited in (sender, receiver):
        limited.limit(megabits * 1e6)
        before = sender.traffic(), receiver.traffic()
        seconds = float(send(sender, receiver.address, count).stdout)
        limited.limit(None)
        assert 0.8 < seconds < 1.25
        sent = (sender.traffic() - before[0]).sent
        received = (receiver.traffic() - before[1]).received
        assert count < sent < 1.1 * count
        assert count < received < 1.1 * count
    assert float(send(sender, receiver.address, count).stdout) < 0.5


def test_a_cut_host_goes_on_alone_and_comes_back(network: Network, receiver: Host) -> None:
    receiver.cut()
    try:
        assert send(network.hosts[0], receiver.address, timeout=1).returncode != 0
        assert send(receiver, network.hosts[0].address, timeout=1).returncode != 0
        assert send(receiver, receiver.address).returncode == 0
        assert send(network.hosts[0], network.hosts[2].address).stderr.rstrip().endswith("refused")
    finally:
        receiver.mend()
    assert send(network.hosts[0], receiver.address).returncode == 0


def test_each_host_has_its_own_folders_name_and_processes(network: Network) -> None:
    first, second = network.hosts[:2]
    for folder in ("/tmp", "/dev/shm"):
        first.run(["touch", f"{folder}/mine"])
        assert "mine" in text(first, "ls", folder)
        assert "mine" not in text(second, "ls", folder)
        assert not Path(folder, "mine").exists()
    first.run(["touch", f"{network.shared}/ours"])
    assert (
        text(second, "ls", str(network.shared))
        == "ours"
        == text(network.outside, "ls", str(network.shared))
    )
    assert (network.shared / "ours").exists()
    assert text(first, "cat", "/proc/sys/kernel/hostname") == "host-1"
    whose = [sys.executable, "-c", "from cluster.io.processes import *; print(this_machine())"]
    assert len({text(host, *whose) for host in network.hosts}) == len(network.hosts)
    assert Path(text(first, "pwd")) == ROOT


def test_programs_get_their_signals_and_a_killed_host_has_none_left(network: Network) -> None:
    host, other = network.hosts[2], network.hosts[0]
    ending = (
        "import signal, sys, time; signal.signal(2, lambda *_: sys.exit(7)); "
        "print('up', flush=True); time.sleep(60)"
    )
    program = host.popen([sys.executable, "-c", ending], stdout=subprocess.PIPE)
    program.stdout.readline()
    program.send_signal(signal.SIGINT)
    assert program.wait(10) == 7
    with pytest.raises(subprocess.TimeoutExpired):
        host.run(["sleep", "60"], timeout=0.5)
    assert host.processes() == []
    host.popen(["sh", "-c", "setsid sleep 60 & setsid sleep 60 & exit"]).wait(10)
    neighbour = other.popen(["sleep", "60"])
    host.run(["touch", "/tmp/kept"])
    assert len(host.processes()) == 2
    host.kill()
    assert host.processes() == []
    assert neighbour.poll() is None
    neighbour.kill()
    assert text(host, "ls", "/tmp/kept") == "/tmp/kept"


def test_sizes_of_shared_memory_and_addresses_of_ipv6(network: Network) -> None:
    with Network(2, shm_mb=64, ipv6=True) as other:  # beside the one of the module
        host, peer = other.hosts
        listen(host)
        for name in (host.address, host.name):
            done = send(peer, name)
            assert done.returncode == 0, done.stderr
        assert text(host, "df", "--output=size", "/dev/shm").split()[-1] == "65536"
        assert "10.77" not in text(host, "ip", "address")


HELD = """
import sys, time
from tests.distributed.hosts.network import Network
with Network(1) as network:
    network.hosts[0].popen(["sleep", "98765"])
    print(network.word, flush=True)
    if sys.argv[1] == "fail":
        raise SystemExit("failed")
    time.sleep(60)
"""


@pytest.mark.parametrize("end", ["fail", signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_stays_however_the_test_ends(network: Network, end: str | int) -> None:
    line = [sys.executable, "-c", HELD, str(end)]
    holder = subprocess.Popen(
        line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    word = holder.stdout.readline().strip()
    assert word
    children = psutil.Process(holder.pid).children(recursive=True) if end != "fail" else []
    if isinstance(end, int):
        holder.send_signal(end)
    assert holder.wait(20) != 0
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    deadline = time.monotonic() + 20
    while left := glob.glob(f"/tmp/tessera-{word}-*"):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def test_why_not_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda tool: None if tool == "tc" else f"/sbin/{tool}")
    assert why_not.__wrapped__().endswith("not here: tc")
    monkeypatch.undo()
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert why_not.__wrapped__() == "hosts are made by root alone"
