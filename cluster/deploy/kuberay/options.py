"""Options of the KubeRay target."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import version
from typing import Annotated

from pydantic import Field

from cluster.deploy.checks import (
    check_each,
    check_image,
    check_label,
    check_label_pair,
    check_object_name,
    check_path,
    check_quantity,
    check_toleration,
    flag,
)
from cluster.deploy.target import DeployOptions, Several

NFS = re.compile(r"(?P<server>[A-Za-z0-9]([A-Za-z0-9.:-]*[A-Za-z0-9])?):(?P<path>/[\w./@%+=-]*)")
LARGEST_INT32 = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class KubeRayOptions(DeployOptions):
    """KubeRay: a RayJob, a RayCluster and what belongs to them, as kustomize overlays."""

    image: str
    """Image with Tessera and its Python, of which every pod runs."""
    namespace: str = "default"
    """Namespace of everything."""
    claim: str = ""
    """PersistentVolumeClaim that is there, which many nodes may write (ReadWriteMany)."""
    storage_class: str = ""
    """Storage class of a new claim; empty: the cluster's default one. It must offer
    ReadWriteMany."""
    storage_size: str = "500Gi"
    """Size of a new claim."""
    nfs: str = ""
    """SERVER:/PATH of an NFS export, in place of a claim."""
    host_path: str = ""
    """Directory that every node has mounted, in place of a claim."""
    mount_path: str = "/shared"
    """Where pods see the shared storage."""
    weights_dir: str = ""
    """Directory of fetched weights and references; empty: weights/ on the shared storage."""
    token_secret: str = ""
    """Secret with Ray's token under the key auth_token, from KubeRay 1.6 on; empty: KubeRay makes
    one for each cluster."""
    env_secret: Several = ()
    """Secret whose keys become environment variables, such as credentials of the URL."""
    pull_secret: Several = ()
    """Secret of the image's registry."""
    gpus_per_node: Annotated[int, Field(ge=1)] = 8
    """GPUs of a machine: the most of one pod."""
    gpu_resource: str = "nvidia.com/gpu"
    """Kubernetes' name of the GPUs."""
    node_selector: Several = ()
    """KEY=VALUE of the nodes with GPUs."""
    toleration: Several = ()
    """KEY[=VALUE][:EFFECT] of a taint that pods tolerate; the GPU's own they do."""
    priority_class: str = ""
    """PriorityClass of all pods."""
    service_account: str = ""
    """ServiceAccount that is there, for cloud identities; empty: one is made, without rights."""
    user_id: Annotated[int, Field(ge=1)] = 1000
    """User and group of the processes; root is refused."""
    retries: Annotated[int, Field(ge=0)] = 3
    """How often a failed job is started again, each time on a new cluster; it resumes."""
    keep_s: Annotated[int, Field(ge=0)] = 600
    """Seconds that the pods stay after the job's end, for a look at them."""
    idle_s: Annotated[int, Field(ge=1)] = 300
    """Seconds after which the autoscaler removes an idle pod."""
    pod_monitor: bool = False
    """Also write a PodMonitor for the Prometheus operator."""
    ray_version: str = ""
    """Ray's version in the image; empty: the one that is installed here."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_image("--image", self.image)
        check_label("--namespace", self.namespace)
        for field in ("claim", "storage_class", "token_secret", "priority_class",
                      "service_account"):  # fmt: skip
            if value := getattr(self, field):
                check_object_name(flag(field), value)
        check_each("--env-secret", self.env_secret, check_object_name)
        check_each("--pull-secret", self.pull_secret, check_object_name)
        check_each("--node-selector", self.node_selector, check_label_pair)
        check_each("--toleration", self.toleration, check_toleration)
        check_quantity("--storage-size", self.storage_size)
        check_path("--mount-path", self.mount_path)
        for field in ("host_path", "weights_dir"):
            if value := getattr(self, field):
                check_path(flag(field), value)
        if self.mount_path in ("/", "/tmp", "/dev", "/dev/shm"):
            raise ValueError(f"--mount-path must hide none of the image, found {self.mount_path}")
        self._check_numbers()
        self._check_storage()

    def _check_numbers(self) -> None:
        for field, least in (("gpus_per_node", 1), ("user_id", 1), ("retries", 0), ("keep_s", 0),
                             ("idle_s", 1)):  # fmt: skip
            value = getattr(self, field)
            if not least <= value <= LARGEST_INT32:
                raise ValueError(f"{flag(field)} must be {least} to {LARGEST_INT32}, found {value}")
        if not re.fullmatch(r"[a-z0-9.-]+/([a-z0-9.-]*gpu|mig-[0-9a-z.]+)", self.gpu_resource):
            raise ValueError(
                "--gpu-resource must be as nvidia.com/gpu or amd.com/gpu, found "
                f"{self.gpu_resource!r}"
            )
        if not re.fullmatch(r"\d+\.\d+\.\d+(\.?\w+)?", self.ray):
            raise ValueError(f"--ray-version must be as 2.60.0, found {self.ray_version!r}")

    def _check_storage(self) -> None:
        if self.nfs and not NFS.fullmatch(self.nfs):
            raise ValueError(f"--nfs must be SERVER:/PATH, found {self.nfs!r}")
        named = {"--claim": self.claim, "--storage-class": self.storage_class, "--nfs": self.nfs,
                 "--host-path": self.host_path}  # fmt: skip
        given = [name for name, value in named.items() if value]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} name two storages: give one")
        if self.run_dir and self.shared and not self.run_dir.startswith(self.mount_path + "/"):
            raise ValueError(
                f"--run-dir must be on the shared storage, below --mount-path {self.mount_path}, "
                f"found {self.run_dir}"
            )

    @property
    def shared(self) -> bool:
        """Whether pods share a storage; without, checkpoints go to the URL alone."""
        named = self.claim or self.storage_class or self.nfs or self.host_path
        return bool(named) or not self.checkpoint_url

    @property
    def makes_claim(self) -> bool:
        return self.shared and not (self.claim or self.nfs or self.host_path)

    @property
    def run_directory(self) -> str:
        return self.run_dir or f"{self.mount_path}/runs/{self.name}"

    @property
    def weights(self) -> str:
        """Directory of fetched files; empty: where the image has them."""
        return self.weights_dir or (f"{self.mount_path}/weights" if self.shared else "")

    @property
    def ray(self) -> str:
        return self.ray_version or version("ray")
