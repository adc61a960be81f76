"""Checks of names, quantities and image references before they are written into a file.

The rules are Kubernetes' own: RFC 1035 and RFC 1123 labels, quantities, labels and taints.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

DNS_1123_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
DNS_1035_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
DNS_1123_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
LABEL_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")
QUANTITY = re.compile(r"([0-9]+)(\.[0-9]+)?(Ki|Mi|Gi|Ti|Pi|Ei|k|M|G|T|P|E)?")
IMAGE = re.compile(
    r"(?:[a-zA-Z0-9](?:[a-zA-Z0-9.-]*[a-zA-Z0-9])?(?::[0-9]+)?/)?"  # registry
    r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*"
    r"(?::[\w][\w.-]{0,127})?(?:@sha256:[0-9a-f]{64})?",
    re.ASCII,
)
ABSOLUTE_PATH = re.compile(r"/|(/[\w.@%+=:,-]+)+", re.ASCII)
LONGEST_LABEL, LONGEST_NAME = 63, 253
EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")


def flag(field: str) -> str:
    """The option of a dataclass's field."""
    return "--" + field.replace("_", "-")


def check_least(options: Any, **least: int) -> None:
    """Refuse numbers below their least values, by field."""
    for field, bound in least.items():
        if (value := getattr(options, field)) < bound:
            raise ValueError(f"{flag(field)} must be >= {bound}, found {value}")


def check(field: str, value: str, valid: bool, expected: str) -> None:
    """Refuse a value that is not valid. Raises ValueError with the field, as all here."""
    if not valid:
        raise ValueError(f"{field} must be {expected}, found {value!r:.80}")


def check_label(field: str, value: str, longest: int = LONGEST_LABEL) -> None:
    """A namespace or another RFC 1123 label."""
    valid = bool(DNS_1123_LABEL.fullmatch(value)) and len(value) <= longest
    rule = f"at most {longest} of a-z, 0-9 and -, with a letter or digit at both ends"
    check(field, value, valid, rule)


def check_service_name(field: str, value: str, longest: int = LONGEST_LABEL) -> None:
    """An RFC 1035 label: KubeRay makes a service of the name."""
    valid = bool(DNS_1035_LABEL.fullmatch(value)) and len(value) <= longest
    rule = f"at most {longest} of a-z, 0-9 and -, a letter first, no - at the end"
    check(field, value, valid, rule)


def check_object_name(field: str, value: str) -> None:
    """The name of a secret, claim, class or account: an RFC 1123 subdomain."""
    valid = bool(DNS_1123_SUBDOMAIN.fullmatch(value)) and len(value) <= LONGEST_NAME
    check(field, value, valid, f"at most {LONGEST_NAME} of a-z, 0-9, - and ., as Kubernetes names")


def check_label_pair(field: str, text: str) -> tuple[str, str]:
    """KEY=VALUE of a Kubernetes label; returns both."""
    key, found, value = text.partition("=")
    valid = bool(found) and _is_label_key(key) and _is_label_value(value)
    check(field, text, valid, "KEY=VALUE of a node's label, such as nvidia.com/gpu.product=H200")
    return key, value


def check_toleration(field: str, text: str) -> tuple[str, str, str]:
    """KEY[=VALUE][:EFFECT] of a taint; returns key, value and effect, empty where not given."""
    taint, colon, effect = text.partition(":")
    key, _, value = taint.partition("=")
    named = effect in EFFECTS or not colon
    valid = _is_label_key(key) and _is_label_value(value) and named
    check(field, text, valid, f"KEY[=VALUE][:EFFECT] of a taint, EFFECT one of {EFFECTS}")
    return key, value, effect


def _is_label_key(text: str) -> bool:
    prefix, slash, name = text.rpartition("/")
    if slash and not (DNS_1123_SUBDOMAIN.fullmatch(prefix) and len(prefix) <= LONGEST_NAME):
        return False
    return bool(LABEL_NAME.fullmatch(name)) and len(name) <= LONGEST_LABEL


def _is_label_value(text: str) -> bool:
    return not text or (bool(LABEL_NAME.fullmatch(text)) and len(text) <= LONGEST_LABEL)


def check_quantity(field: str, value: str) -> None:
    """An amount of bytes such as 500Gi."""
    found = QUANTITY.fullmatch(value)
    positive = found is not None and float(found[1] + (found[2] or "")) > 0
    check(field, value, positive, "an amount such as 500Gi or 1.5Ti")


def check_image(field: str, value: str) -> None:
    """A container image with a tag or digest, so that every node runs the same one."""
    valid = bool(IMAGE.fullmatch(value))
    check(field, value, valid, "an image such as registry.org/team/name:tag")
    tagged = "@" in value or ":" in value.rpartition("/")[2]
    check(field, value, tagged, "an image with a tag or a digest (without, nodes may differ)")


def check_path(field: str, value: str) -> None:
    """An absolute path without characters that a shell or YAML would read."""
    valid = bool(ABSOLUTE_PATH.fullmatch(value)) and ".." not in value.split("/")
    check(field, value, valid, "an absolute path of letters, digits and ._@%+=:,- without ..")


def check_each(field: str, values: tuple[str, ...], of_each: Callable[[str, str], object]) -> None:
    """Apply a check to each of several values, and refuse one that is there twice."""
    for value in values:
        of_each(field, value)
        check(field, value, values.count(value) == 1, "named once each")
