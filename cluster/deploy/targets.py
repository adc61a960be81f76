"""The targets of deployment: what `python -m cluster.deploy` can write."""

from __future__ import annotations

from cluster.deploy.kuberay.files import KUBERAY
from cluster.deploy.target import Target

TARGETS: tuple[Target, ...] = (KUBERAY,)
