"""Every command of cluster/from-zero-to-a-cluster.md, in order, on three hosts."""

from __future__ import annotations

import re
import shlex
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from cluster.deploy.command import run as deploy
from tests.distributed.hosts.cluster import QUICK
from tests.distributed.hosts.network import BIN, ROOT, Host, Network
from tests.small_run import flags
from tests.unit.cluster.deploy.plans import eight_gpus, text

PAGE = (ROOT / "cluster" / "from-zero-to-a-cluster.md").read_text()
HEAD, EVERY, OTHERS, YOURS = (
    "on the head", "on every node", "on every other node", "on your machine",
)  # fmt: skip
BLOCK_S = 400.0


def blocks() -> list[tuple[str, str]]:
    """(where, commands) of the page's blocks that run, in order."""
    found = re.findall(r"^```bash\n# (on [a-z ]+)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert len(found) == PAGE.count("```bash")
    assert {where for where, _ in found} == {HEAD, EVERY, OTHERS, YOURS}
    return found


def ports() -> set[int]:
    """Those of the page's table."""
    rows = re.findall(r"^\| ([\d, to]+) \| (?:head|all)", PAGE, re.MULTILINE)
    found: set[int] = set()
    for row in rows:
        first, _, last = row.partition(" to ")
        found |= (
            set(range(int(first), int(last) + 1)) if last else {int(n) for n in row.split(", ")}
        )
    return found


class Walk:
    """The page's blocks with this machine's names and sizes, each run where it says."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.run = network.shared / "runs" / "first"
        small = [*flags(), "--iterations", "5000", "--evaluation.num-images", "0"]
        small += ["--output.gallery-every", "0", "--output.checkpoint-every", "5000"]
        small += ["--rewards.extra", "tests.stand_ins:Brightness=0.1,seconds=0.3"]
        self.changes = {
            r"/shared/": f"{network.shared}/",
            r"/local/": "/tmp/",
            r"HEAD:": f"{network.hosts[0].name}:",
            r"ray start ": "ray start --num-cpus=2 --object-store-memory=200000000 ",
            r"--preset llamagen-b-256 --num-samplers 8 --num-reward-servers 4 --num-learners 2":
                f"--num-samplers 1 --num-reward-servers 1 {shlex.join(small)}",
            r" --(sampler|reward|learner)\.num-gpus \S+": "",
            r"--samplers 12 --reward-servers 6": "--samplers 2 --reward-servers 2",
        }  # fmt: skip
        self.used: set[str] = set()

    def small(self, commands: str) -> str:
        commands = re.sub(r"\\\n\s*", "", commands)
        for old, new in self.changes.items():
            commands, count = re.subn(old, lambda _, new=new: new, commands)
            self.used |= {old} if count else set()
        return commands

    def hosts(self, where: str) -> Sequence[Host]:
        hosts = self.network.hosts
        return {HEAD: hosts[:1], OTHERS: hosts[1:], EVERY: hosts}[where]

    def block(self, where: str, commands: str) -> str:
        """Run a block on all of its hosts at once; it must succeed. Returns what it printed."""
        line = ["bash", "-ec", self.small(commands)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        started = [host.popen(line, QUICK, **pipes) for host in self.hosts(where)]
        said = ""
        for process in started:
            printed, _ = process.communicate(timeout=BLOCK_S)
            assert process.returncode == 0, f"{commands}\n{printed}"
            said += printed
        return said

    def listening(self) -> set[int]:
        """Ports of the hosts that others can reach."""
        found = set()
        for host in self.network.hosts:
            for line in host.run(["ss", "-ltnH"]).stdout.splitlines():
                address, _, port = line.split()[3].rpartition(":")
                if not address.strip("[]").endswith("127.0.0.1"):
                    found.add(int(port))
        return found

    def wait_for(self, file: Path, words: str = "") -> None:
        deadline = time.monotonic() + BLOCK_S
        while not (file.is_file() and words in file.read_text()):
            log = self.run / "run.log"
            assert time.monotonic() < deadline, log.read_text() if log.is_file() else "no run.log"
            time.sleep(0.2)


@pytest.fixture
def walk(network: Network) -> Iterator[Walk]:
    activate = network.shared / "venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text(f"export PATH={shlex.quote(str(BIN))}:$PATH\n")
    yield Walk(network)
    for host in network.hosts:
        host.kill()


@pytest.mark.slow  # two jobs, and each command imports torch anew
@pytest.mark.timeout(1200)
def test_the_pages_commands_in_their_order(walk: Walk) -> None:
    steps = [(where, commands) for where, commands in blocks() if where != YOURS]
    saw = []
    for where, commands in steps:
        said = walk.block(where, commands)
        saw.append(said)
        if "--submission-id first-1" in commands:
            walk.wait_for(walk.run / "metrics.jsonl")
            assert walk.listening() - ports() == set(), "ports that the table lacks"
        if "cluster.status" in commands:
            assert "sampler" in said
            assert "first-1" in said
        if "cluster.scale" in commands:
            assert "sampler: 2 serving" in said
        if "cluster.stop" in commands:
            assert "go on with" in said
        if "--submission-id first-2" in commands:
            walk.wait_for(walk.run / "run.log", "resumed from step_")
    assert walk.used == set(walk.changes), "the page lacks what is replaced here"
    everything = "\n".join(saw)
    assert "actors.weights fetch llamagen-b-256" in everything, "the dry run lists what is missing"
    assert everything.count("free: ") == 3, "three nodes joined"
    assert all(not host.run(["pgrep", "raylet"]).stdout for host in walk.network.hosts)


def test_the_pages_deployment_files_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a plan that is there, which spares this test the planner."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.json").write_text(text(eight_gpus()))
    ((_, commands),) = [block for block in blocks() if block[0] == YOURS]
    lines = re.sub(r"\\\n\s*", "", commands).splitlines()
    assert len(lines) == 4
    for line in lines:
        module, *arguments = shlex.split(line.replace("REGISTRY", "registry.example"))[2:]
        assert module == "cluster.deploy"
        assert deploy([*arguments, "--plan", "plan.json"]) == 0, capsys.readouterr().err
        folder = tmp_path / arguments[arguments.index("--out") + 1]
        assert list(folder.rglob("*")), line
    for path in re.findall(
        r"deploy/(?:slurm|aws)/[\w.]+", PAGE.partition("## Kubernetes, Slurm")[2]
    ):
        assert (tmp_path / path).is_file(), path
