"""A configuration file that notices when it is not what was written any more.

The last lines are comments: which run it is, and a checksum of everything above.
"""

from __future__ import annotations

import hashlib

from cluster.errors import ConfigError

RUN = "# run "
SHA256 = "# sha256 "


def add_checksum(text: str, run: str) -> str:
    """A YAML text with its run's identity and its checksum."""
    body = f"{text}{RUN}{run}\n"
    return f"{body}{SHA256}{hashlib.sha256(body.encode()).hexdigest()}\n"


def verify_checksum(data: bytes, source: str) -> tuple[str, str]:
    """Inverse of `add_checksum`: the text and the run.

    Args:
        source: the file's name, for errors.

    Raises:
        ConfigError: cut short, damaged or edited.
    """
    body, mark, digest = data.rpartition(SHA256.encode())
    if not mark:
        raise ConfigError(
            f"{source}: expected a checksum in its last line, found none: the file was cut short, "
            "or is of a version that wrote none. Put a copy of it back, or start a new run with "
            "--preset and this file"
        )
    if digest.decode(errors="replace") != hashlib.sha256(body).hexdigest() + "\n":
        raise ConfigError(
            f"{source}: it is not what the run wrote (its checksum differs). To change settings, "
            "leave the file as it was and give them as flags to --resume; a file that was not "
            "edited is damaged: every checkpoint holds a copy"
        )
    text = body.decode()
    body_text, _, run = text.rpartition(RUN)
    return body_text, run.strip()
