"""The KubeRay target against a real API server: kustomize builds the overlays, the server takes
every object with KubeRay's CRDs, and pods meet the Pod Security Standard `restricted`. Nothing
runs.

KUBEBUILDER_ASSETS names a directory with etcd, kube-apiserver and kubectl (as the Kubernetes
project's `setup-envtest` lays them out), TESSERA_KUBERAY_CRDS one with KubeRay's CRDs.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.unit.cluster.deploy.kuberay.manifests import made, manifests, of_kind, templates
from tests.unit.cluster.deploy.kuberay.schemas import CRDS, as_pod

ASSETS = Path(os.environ.get("KUBEBUILDER_ASSETS", "/usr/local/kubebuilder/bin"))
CRD_DIRECTORY = os.environ.get("TESSERA_KUBERAY_CRDS", "")
KUBECTL = shutil.which("kubectl", path=f"{ASSETS}:{os.environ['PATH']}")
TOKEN, STARTS_S = "only-for-this-test", 120.0
GPUS = pytest.mark.parametrize("gpus", [1, 8, 64])

Kubectl = Callable[..., subprocess.CompletedProcess[str]]


def written(directory: Path, gpus: int, *more: str) -> Path:
    """Write the files of a plan; returns the directory of its overlays."""
    for path, text in made(gpus, *more).items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_text(text)
    return directory / "overlays"


@pytest.mark.skipif(KUBECTL is None, reason="no kubectl")
@GPUS
@pytest.mark.parametrize("kind", ["job", "cluster"])
def test_kustomize_builds_the_overlays(kind: str, gpus: int, tmp_path: Path) -> None:
    overlay = written(tmp_path, gpus) / f"{kind}-{gpus}-gpu{'s' * (gpus != 1)}"
    built = subprocess.run(
        [str(KUBECTL), "kustomize", str(overlay)], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    kinds = [each["kind"] for each in yaml.safe_load_all(built.stdout)]
    assert sorted(kinds) == sorted(
        ["NetworkPolicy", "PersistentVolumeClaim", "PodDisruptionBudget", "ServiceAccount",
         {"job": "RayJob", "cluster": "RayCluster"}[kind]]
    )  # fmt: skip


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def kubectl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kubectl]:
    """Runs kubectl against an API server of this module's own, which has KubeRay's CRDs."""
    if not (ASSETS / "kube-apiserver").exists():
        pytest.skip("KUBEBUILDER_ASSETS names no directory with etcd, kube-apiserver and kubectl")
    if not CRD_DIRECTORY:
        pytest.skip("TESSERA_KUBERAY_CRDS names no directory with KubeRay's CRDs")
    here = tmp_path_factory.mktemp("kubernetes")
    client, peer, secure = free_ports(3)
    (here / "tokens.csv").write_text(f'{TOKEN},admin,admin,"system:masters"\n')
    key = str(here / "accounts.key")
    subprocess.run(["openssl", "genrsa", "-out", key, "2048"], check=True, capture_output=True)
    etcd = [
        str(ASSETS / "etcd"), "--data-dir", str(here / "etcd"), "--unsafe-no-fsync",
        "--listen-client-urls", f"http://127.0.0.1:{client}",
        "--advertise-client-urls", f"http://127.0.0.1:{client}",
        "--listen-peer-urls", f"http://127.0.0.1:{peer}",
        "--initial-advertise-peer-urls", f"http://127.0.0.1:{peer}",
        "--initial-cluster", f"default=http://127.0.0.1:{peer}",
    ]  # fmt: skip
    server = [
        str(ASSETS / "kube-apiserver"), f"--etcd-servers=http://127.0.0.1:{client}",
        "--bind-address=127.0.0.1", f"--secure-port={secure}",
        f"--cert-dir={here / 'certificates'}",
        f"--token-auth-file={here / 'tokens.csv'}", "--authorization-mode=AlwaysAllow",
        "--service-account-issuer=https://127.0.0.1", f"--service-account-key-file={key}",
        f"--service-account-signing-key-file={key}", "--service-cluster-ip-range=10.96.0.0/24",
        "--disable-admission-plugins=ServiceAccount",  # no controller makes `default`
    ]  # fmt: skip
    logs = [open(here / f"{name}.log", "w") for name in ("etcd", "server")]  # noqa: SIM115
    processes = [
        subprocess.Popen(command, stdout=log, stderr=log)
        for command, log in zip((etcd, server), logs)
    ]

    def run(
        *arguments: str, check: bool = True, **options: str
    ) -> subprocess.CompletedProcess[str]:
        command = [str(KUBECTL), f"--server=https://127.0.0.1:{secure}", f"--token={TOKEN}",
                   "--insecure-skip-tls-verify", f"--cache-dir={here / 'cache'}"]  # fmt: skip
        ended = subprocess.run(
            [*command, *arguments], capture_output=True, text=True, input=options.get("given")
        )
        assert not check or ended.returncode == 0, ended.stderr
        return ended

    try:
        began = time.monotonic()
        while run("get", "--raw=/readyz", check=False).stdout != "ok":
            assert all(each.poll() is None for each in processes), (here / "server.log").read_text()
            assert time.monotonic() - began < STARTS_S
            time.sleep(0.5)
        for name in CRDS.values():
            run("create", "-f", f"{CRD_DIRECTORY}/ray.io_{name}.yaml")
            shown = ["get", f"crd/{name}.ray.io", "-o", "jsonpath={.status.conditions[*].type}"]
            while "Established" not in run(*shown).stdout:
                assert time.monotonic() - began < STARTS_S
                time.sleep(0.2)
        run("create", "namespace", "strict")
        run("label", "namespace", "strict", "pod-security.kubernetes.io/enforce=restricted")
        yield run
    finally:
        for each in reversed(processes):  # the server first: it would wait for etcd
            each.kill()
            each.wait()
        for log in logs:
            log.close()


@GPUS
@pytest.mark.parametrize("kind", ["job", "cluster"])
@pytest.mark.parametrize(
    "more",
    [[], ["--checkpoint-url", "s3://b/x"], ["--nfs", "10.0.0.1:/a", "--env-secret", "s"]],
    ids=["claim", "url", "nfs"],
)
def test_the_server_takes_every_object(
    kubectl: Kubectl, kind: str, gpus: int, more: list[str], tmp_path: Path
) -> None:
    overlay = written(tmp_path, gpus, *more) / f"{kind}-{gpus}-gpu{'s' * (gpus != 1)}"
    shown = kubectl("apply", "--dry-run=server", "--validate=strict", "-k", str(overlay)).stdout
    resource = {"job": "rayjob", "cluster": "raycluster"}[kind]
    assert f"{resource}.ray.io/tessera created (server dry run)" in shown
    assert "poddisruptionbudget.policy/tessera created (server dry run)" in shown


def test_the_server_sees_faults(kubectl: Kubectl, tmp_path: Path) -> None:
    overlay = written(tmp_path, 8) / "job-8-gpus"
    good = (overlay / "rayjob.yaml").read_text()
    for wrong in (
        good.replace("backoffLimit: 3", "backoffLimit: three"),
        good.replace("submissionMode: K8sJobMode", "submissionModes: K8sJobMode"),
        good.replace("version: v2", "version: v3"),
    ):
        assert wrong != good
        ended = kubectl(
            "apply", "--dry-run=server", "--validate=strict", "-f", "-", check=False, given=wrong
        )
        assert ended.returncode != 0


@pytest.mark.parametrize("more", [[], ["--checkpoint-url", "s3://b/x"], ["--nfs", "a:/b"]])
def test_pods_are_admitted_as_restricted(kubectl: Kubectl, more: list[str]) -> None:
    """Pod Security's strictest level, where a namespace enforces it; it refuses NFS volumes."""
    (job,) = of_kind(manifests(8, *more), "RayJob")
    pods = [*templates(job["spec"]["rayClusterSpec"]).values(), job["spec"]["submitterPodTemplate"]]
    for pod in pods:
        given = yaml.safe_dump(as_pod(pod))
        ended = kubectl(
            "create", "--dry-run=server", "--validate=strict", "-n", "strict", "-f", "-",
            check=False, given=given,
        )  # fmt: skip
        mounts = "nfs" in given
        assert (ended.returncode == 0) == (not mounts), ended.stderr
        assert ("violates PodSecurity" in ended.stderr) == mounts
