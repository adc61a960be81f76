"""A network as a feature extractor: batches, image sizes, device, precision.

Shapes: N images, H W pixels, S the side the network takes, D feature dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from cluster.errors import DataError
from rewards.base import ImageErrors, Images, by_size
from rewards.networks.open_clip_models import Precision


class NetworkFeatures:
    """Features of images of any size.

    Args:
        network: moved to the device, set to eval and frozen.
        embed: (n, 3, S, S) fp32 -> (n, D), with the network.
        preprocess: n images of one size, (n, H, W, 3) uint8 -> (n, 3, S, S) fp32.
        fingerprint: of network, weights and preprocessing.
        batch: images in a forward pass.
        precision: bf16 is autocast with fp32 weights; fp32 excludes TF32 after
            `cluster.program.precision.start_computing`.
        further: names and dimensions of further spaces, the last columns of `embed`'s values.
    """

    def __init__(
        self,
        network: nn.Module,
        embed: Callable[[Tensor], Tensor],
        preprocess: Callable[[np.ndarray], Tensor],
        fingerprint: str,
        *,
        device: str = "cpu",
        batch: int = 32,
        precision: Precision = "fp32",
        further: Mapping[str, int] | None = None,
    ) -> None:
        network.to(device).eval().requires_grad_(False)
        self._embed, self._preprocess = embed, preprocess
        self._device, self._batch, self._precision = torch.device(device), batch, precision
        self.fingerprint = fingerprint if precision == "fp32" else f"{fingerprint}-{precision}"
        self.dim = 0  # unknown before the first image
        self.further = dict(further or {})

    def warm(self) -> None:
        """Run one image: libraries load and memory is reserved before the first request."""
        self(np.zeros((1, 64, 64, 3), np.uint8))

    @torch.inference_mode()
    def __call__(self, images: Images) -> np.ndarray:
        """N uint8 images -> (N, D) float32, D with the further spaces."""
        starts = range(0, len(images), self._batch)
        # one download, so that a batch is prepared while a GPU computes the one before
        found = torch.cat([self._extract(images[at : at + self._batch]) for at in starts])
        self.dim = found.shape[1] - sum(self.further.values())
        return found.cpu().numpy()

    def _extract(self, images: Images) -> Tensor:
        with self._computing():
            return self._embed(self._pixels(images)).float()

    def _pixels(self, images: Images) -> Tensor:
        """Images of mixed sizes as one batch for the network."""
        if isinstance(images, np.ndarray):
            return self._preprocess(images).to(self._device)
        made = [(rows, self._preprocess(same)) for rows, same in by_size(images)]
        return in_order(made).to(self._device)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        if self._precision == "bf16":
            with torch.autocast(self._device.type, torch.bfloat16):
                yield
        else:
            yield


def in_order(parts: Sequence[tuple[np.ndarray, Tensor]]) -> Tensor:
    """Tensors of images of one size each, with the indices of these images -> one tensor (N, ...),
    in the order of the images."""
    if len(parts) == 1:  # `by_size` keeps the order
        return parts[0][1]
    order = np.argsort(np.concatenate([rows for rows, _ in parts]))
    values = torch.cat([values for _, values in parts])
    return values.index_select(0, torch.from_numpy(order).to(values.device))


def each_size(images: Images, extract: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Features (N, D) of images of mixed sizes, in the order of the images.

    Args:
        extract: (n, H, W, 3) uint8 -> (n, D) float32; raises DataError for sizes it does not take.

    Raises:
        DataError: `images` is an array that `extract` refuses.
        ImageErrors: images of a sequence that `extract` refuses, or whose D differ.
    """
    if isinstance(images, np.ndarray):
        return extract(images)
    errors: dict[int, str] = {}
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    for rows, same in by_size(images):
        try:
            parts.append((rows, extract(same)))
        except DataError as error:
            errors.update((int(index), str(error)) for index in rows)
    if errors:
        raise ImageErrors(errors)
    return _in_order(parts)


def _in_order(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    first, dim = parts[0][0], parts[0][1].shape[1]
    for rows, features in parts:
        if features.shape[1] != dim:
            # Neither part is wrong by itself.
            message = f"gives {features.shape[1]} features, but image {first[0]} gives {dim}"
            raise ImageErrors({int(row): message for row in rows})
    order = np.argsort(np.concatenate([rows for rows, _ in parts]))
    return np.concatenate([features for _, features in parts])[order]
