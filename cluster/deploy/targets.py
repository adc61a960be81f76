"""The targets of deployment: what `python -m cluster.deploy` can write."""

from __future__ import annotations

from cluster.deploy.kuberay.files import KUBERAY
from cluster.deploy.ray_up.files import RAY_UP
from cluster.deploy.slurm.files import SLURM
from cluster.deploy.target import Target

TARGETS: tuple[Target, ...] = (KUBERAY, SLURM, RAY_UP)
