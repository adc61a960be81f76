"""Proxies between this program and a cluster."""

from __future__ import annotations

import pytest

from cluster.errors import FleetError
from cluster.ray_session.proxies import SWITCH, check_proxy, is_exception

PROXY = {"http_proxy": "http://user:secret@10.9.9.9:3128"}


@pytest.mark.parametrize(
    "environment",
    [
        PROXY,  # Ray's gRPC uses none by itself
        {SWITCH: "1"},
        {SWITCH: "0", **PROXY},
        {SWITCH: "1", **PROXY, "no_proxy": "localhost, 10.0.0.0/8"},
        {SWITCH: "true", **PROXY, "no_grpc_proxy": "10.0.0.4", "no_proxy": "other"},
    ],
)
def test_traffic_that_goes_directly(environment: dict[str, str]) -> None:
    check_proxy("10.0.0.4", environment)


@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "grpc_proxy"])
def test_a_proxy_that_ray_would_use_is_refused(variable: str) -> None:
    environment = {SWITCH: "1", variable: PROXY["http_proxy"], "no_proxy": "10.0.0.5"}
    with pytest.raises(FleetError, match=rf"proxy of \${variable}.* add 10\.0\.0\.4 ") as caught:
        check_proxy("10.0.0.4", environment)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("host", "exceptions", "found"),
    [
        ("head.cluster", ".cluster", True),
        ("head.cluster", "example.org,head.cluster", True),
        ("10.1.2.3", "10.1.0.0/16", True),
        ("10.2.2.3", "10.1.0.0/16", False),
        ("fd00::1", "fd00::/8", True),
        ("fd00::1", "10.0.0.0/8, ::1", True),  # a suffix, as gRPC compares
        ("head", "", False),
        ("head", " , ", False),
    ],
)
def test_exceptions(host: str, exceptions: str, found: bool) -> None:
    assert is_exception(host, exceptions) is found
