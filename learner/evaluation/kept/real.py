"""Features and moments of the real images, kept beside the samples that they are compared with.

DIR/real/manifest.json     of which images and networks they are
DIR/real/real.npz          features/SPACE (M, D) float32; moments/SPACE/mu, moments/SPACE/sigma
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import ConfigError, DataError
from cluster.io.checksum import DAMAGED_ARRAYS
from cluster.io.files import replacing, writing
from cluster.io.strict_json import MALFORMED
from learner.config import RunConfig
from learner.data.named_sets import is_named
from learner.evaluation.kept.identity import differences, images_digest, judge_identity
from learner.evaluation.kept.samples import CONTINUE, FEATURES, MANIFEST, write_json
from rewards.distribution.reference import Reference
from rewards.metrics.samples import RealImages

REAL = "real"
MOMENTS = "moments/"
ARRAYS = "real.npz"


def real_identity(config: RunConfig) -> dict[str, Any]:
    """What the features and moments depend on.

    Raises:
        ConfigError: the home directory of a path is not known.
        CheckpointError, DataError, OSError: a file cannot be read.
    """
    source = config.evaluation.images
    digest = "" if is_named(source) else images_digest(source)
    return {"images": source, "sha256": digest, **judge_identity(config)}


def write_real(out: Path, identity: Mapping[str, Any], real: RealImages) -> None:
    """Keep them. Raises StorageError: no space left."""
    arrays = {FEATURES + space: values for space, values in real.features.items()}
    about = {}
    for space, reference in real.moments.items():
        arrays |= {f"{MOMENTS}{space}/mu": reference.mu, f"{MOMENTS}{space}/sigma": reference.sigma}
        about[space] = {
            "fingerprint": reference.fingerprint,
            "source": reference.source,
            "images": reference.images,
        }
    path = out / REAL / ARRAYS
    with (
        writing(path, then=CONTINUE),
        replacing(path, durable=True) as partial,
        partial.open("wb") as file,
    ):
        np.savez(file, **arrays)  # type: ignore[arg-type]
    write_json(out / REAL / MANIFEST, {"identity": identity, "moments": about})


def kept_identity(out: Path) -> dict[str, Any] | None:
    """What the kept ones are of; None if there are none.

    Raises:
        DataError: the file is damaged.
    """
    path = out / REAL / MANIFEST
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["identity"])
    except MALFORMED as error:
        raise _damaged(path, error) from error


def read_real(out: Path, identity: Mapping[str, Any] | None = None) -> RealImages | None:
    """The kept ones; None if there are none.

    Args:
        identity: of those that are wanted; None: any.

    Raises:
        ConfigError: they are of other images or networks; says what differs.
        DataError: a file is damaged.
    """
    path = out / REAL / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if identity is not None and (found := differences(manifest["identity"], identity)):
            raise ConfigError(
                f"{out} compares with other real images ({'; '.join(found)}): name another --out"
            )
        about = dict(manifest["moments"])
        with np.load(path.with_name(ARRAYS), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        return RealImages(
            {k.removeprefix(FEATURES): v for k, v in arrays.items() if k.startswith(FEATURES)},
            {space: _reference(space, fields, arrays) for space, fields in about.items()},
        )
    except ConfigError:
        raise
    except (*MALFORMED, *DAMAGED_ARRAYS, DataError) as error:
        raise _damaged(path, error) from error


def _damaged(manifest: Path, error: Exception) -> DataError:
    folder = manifest.parent
    return DataError(f"{folder}: damaged ({error}): remove {folder}, and {CONTINUE}")


def _reference(
    space: str, fields: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> Reference:
    return Reference(
        arrays[f"{MOMENTS}{space}/mu"],
        arrays[f"{MOMENTS}{space}/sigma"],
        str(fields["fingerprint"]),
        str(fields["source"]),
        int(fields["images"]),
    )
