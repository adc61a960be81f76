"""HTTP proxies, through which no node of a cluster is reached.

Ray's gRPC uses none, unless RAY_grpc_enable_http_proxy says so; `ray job submit` talks HTTP to the
dashboard, through the proxy of http_proxy unless no_proxy has the dashboard's host.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping

from cluster.errors import FleetError

SWITCH = "RAY_grpc_enable_http_proxy"
PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")  # the order in which gRPC looks
EXCEPTIONS = ("no_grpc_proxy", "no_proxy")


def check_proxy(host: str, environment: Mapping[str, str]) -> None:
    """Check that Ray's own traffic to a host goes through no proxy.

    Raises:
        FleetError: it does, and would wait for minutes.
    """
    if environment.get(SWITCH, "0").lower() not in ("1", "true"):
        return
    proxy = next((name for name in PROXIES if environment.get(name)), "")
    exceptions = next((found for name in EXCEPTIONS if (found := environment.get(name))), "")
    if proxy and not is_exception(host, exceptions):
        raise FleetError(
            f"{SWITCH} is set, so Ray would talk to {host} through the proxy of ${proxy}, which "
            f"reaches no node of a cluster: unset {SWITCH}, or add {host} and the other nodes to "
            "no_proxy"
        )


def is_exception(host: str, exceptions: str) -> bool:
    """Whether a list as of no_proxy (names, suffixes, networks) has a host, as gRPC reads it."""
    for entry in (each.strip() for each in exceptions.split(",")):
        if not entry:
            continue
        if host.endswith(entry):
            return True
        try:
            if ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False):
                return True
        except ValueError:  # a name
            continue
    return False
