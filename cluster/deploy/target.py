"""A target of deployment, and the options that all targets share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from pydantic import Field

from cluster.deploy.checks import check_least, check_path, check_service_name
from cluster.deploy.plan_document import PlanDocument

LONGEST_NAME = 40
"""KubeRay adds to a job's name for its clusters, services and pods, 63 characters at most."""
Several = Annotated[tuple[str, ...], tyro.conf.arg(name=None), tyro.conf.UseAppendAction]
"""An option that may be given several times, each with one value."""
URL_SCHEMES = ("s3://", "gs://", "gcs://", "az://", "abfs://", "hdfs://", "https://", "file://")


@dataclass(frozen=True, kw_only=True)
class DeployOptions:
    """What every target asks."""

    preset: Annotated[str, tyro.conf.arg(aliases=("-p",))]
    """Shipped preset by name, or a YAML file. Further options of learner.run follow after `--`."""
    gpus: Annotated[int, Field(ge=0)]
    """GPUs in all; 0: a fleet on CPUs."""
    gpu: str = ""
    """Kind of GPU: h200, h100, a100, l40s or 4090; empty: learner.plan's default."""
    plan: Path | None = None
    """Plan to take: a file of `learner.plan --json`; by default it is made."""
    out: Path = Path("deploy")
    """Directory to write into."""
    force: bool = False
    """Overwrite files that are there with other contents."""
    name: str = "tessera"
    """Name of the run, and of what is made for it."""
    run_dir: str = ""
    """Run directory as the nodes see it; empty: runs/NAME on the shared storage."""
    checkpoint_url: str = ""
    """Where copies of the checkpoints go, and where a lost run directory comes back from:
    s3://bucket/run and the like. With it, no shared storage is needed."""
    preset_text: tyro.conf.Suppress[str] = ""
    """Contents of the preset, if it is a file."""
    run_arguments: tyro.conf.Suppress[tuple[str, ...]] = ()
    """Further options of learner.run: what followed `--`."""

    def __post_init__(self) -> None:
        check_least(self, gpus=0)
        check_service_name("--name", self.name, LONGEST_NAME)
        if self.run_dir:
            check_path("--run-dir", self.run_dir)
        if self.checkpoint_url and not self.checkpoint_url.startswith(URL_SCHEMES):
            raise ValueError(
                f"--checkpoint-url must begin with one of {', '.join(URL_SCHEMES)}, found "
                f"{self.checkpoint_url!r}"
            )

    @property
    def preset_path(self) -> str:
        """Absolute path of a preset that is a file, on this machine; empty: it is shipped."""
        return str(Path(self.preset).absolute()) if self.preset_text else ""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A kind of cluster for which files are written."""

    name: str
    """Of the subcommand."""
    about: str
    """One line of help."""
    options: type[DeployOptions]
    files: Callable[[PlanDocument, Any], Mapping[str, str]]
    """A pure function of the plan and of these options: relative path -> text, without the head
    that every file gets."""
    checked: str
    """What has not run, and how the files were checked: a sentence of every file's head."""
    next_steps: Callable[[PlanDocument, Any], str]
    """What to do with the files."""
    common: tuple[str, ...] = ()
    """Folders whose files are the same for every plan, so that several plans share them."""
