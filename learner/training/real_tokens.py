"""Cross-entropy on the tokens of real images, a regulariser (VA-pi uses it with weight 0.1)."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from actors.checkpoints.loading import TokenizerConfig, load_tokenizer
from actors.models.base import Policy
from actors.models.vq import VQTokenizer
from actors.text.tables import UNREADABLE_PARQUET
from cluster.bounds import check_at_most
from cluster.errors import DataError
from cluster.io.checksum import DAMAGED_ARRAYS
from cluster.messages import Condition
from cluster.model_files.file_kinds import FileKind, described, file_kind, presumed_kind
from cluster.model_files.tensors import locate
from learner.data.datasets import load_images, load_labels
from learner.data.named_sets import is_named
from rewards.images.sources import CLASSES as SAMPLE_CLASSES
from rewards.images.sources import SAMPLES

ENCODED_AT_ONCE = 32
TOKENS, CLASSES = "tokens", "classes"
PARQUET_CLASSES = "class_index"


@dataclass(frozen=True, kw_only=True)
class RealTokensConfig:
    """Cross-entropy on real images' tokens, added to the loss."""

    weight: float = 0.0
    """Weight of the mean cross-entropy (nats a token); 0: none."""
    source: str = "digits:train"
    """Real images with classes: "digits:train", an .npz with uint8 images arr_0 and classes arr_1
    (encoded with the tokenizer when the learner starts), or ready tokens: an .npz with tokens (N,
    T), in the policy's order, and classes (N,), or a .parquet with tokens and class_index."""
    batch: int = 32
    """Images of each optimizer step."""

    def __post_init__(self) -> None:
        check_at_most(self, weight=1e6)
        if self.weight < 0 or self.batch < 1:
            raise ValueError(
                "weight must be >= 0 and batch >= 1 of the cross-entropy on real tokens, found "
                f"{self.weight} and {self.batch}"
            )


def cross_entropy(logprobs: Tensor) -> Tensor:
    """-(1/BT) sum_bt log pi(x_t | x_<t, c) of real tokens x: mean over tokens, nats.

    Args:
        logprobs: (B, T) of the conditional policy, without guidance or filters.
    """
    return -logprobs.mean()


class RealTokens:
    """Token grids of real images and their classes.

    Raises:
        DataError: a source that cannot be read, or does not fit the policy.
    """

    def __init__(
        self, config: RealTokensConfig, policy: Policy, tokenizer: TokenizerConfig, seed: int = 0
    ) -> None:
        """seed: the run's."""
        tokens, classes = _load(config.source, policy, tokenizer)
        _check(config.source, tokens, classes, policy)
        self.tokens, self.classes = tokens, classes
        self._size, self._seed = config.batch, seed

    def draw(self, iteration: int, update: int) -> tuple[np.ndarray, tuple[Condition, ...]]:
        """Tokens (B, T) int64 and conditions of one optimizer step, drawn with replacement as a
        function of (seed, iteration, update)."""
        key = [self._seed, zlib.crc32(b"real tokens")]
        generator = np.random.Generator(
            np.random.Philox(key=key, counter=[0, 0, update, iteration])
        )
        index = generator.integers(0, len(self.tokens), self._size)
        asked = (Condition(text="", class_index=int(label)) for label in self.classes[index])
        return self.tokens[index], tuple(asked)


def check_source(source: str) -> None:
    """Check that a source exists and has the arrays that are read; reads headers only.

    Raises:
        DataError, CheckpointError: it does not.
    """
    if is_named(source):
        load_images(source)
        return
    place, names = locate(source), list[str]()
    table = presumed_kind(place) is FileKind.PARQUET
    try:
        if table:
            names = pq.read_schema(place).names
        elif file_kind(place) is FileKind.NPZ:
            with np.load(place, allow_pickle=False) as file:
                names = file.files
        else:
            raise DataError(
                f"{source}: expected an .npz or a Parquet file, found {described(place)}"
            )
    except (*UNREADABLE_PARQUET, *DAMAGED_ARRAYS) as error:
        raise _unreadable(source, error) from error
    wanted: tuple[str, ...] = (TOKENS, PARQUET_CLASSES)
    if not table:
        wanted = (TOKENS, CLASSES) if TOKENS in names else (SAMPLES, SAMPLE_CLASSES)
    if lacking := [name for name in wanted if name not in names]:
        raise DataError(f"{source}: expected {' and '.join(wanted)}, found no {', '.join(lacking)}")


def _unreadable(source: str, error: Exception) -> DataError:
    return DataError(f"real tokens {source}: not a readable file ({error}): write it again")


def _load(source: str, policy: Policy, tokenizer: TokenizerConfig) -> tuple[np.ndarray, np.ndarray]:
    if is_named(source):
        return _encoded(load_images(source), policy, tokenizer), load_labels(source)
    if presumed_kind(locate(source)) is FileKind.PARQUET:
        return _from_parquet(source)
    try:
        with np.load(locate(source), allow_pickle=False) as file:
            if TOKENS in file and CLASSES in file:
                tokens, classes = file[TOKENS], file[CLASSES]
                return _integers(source, TOKENS, tokens), _integers(source, CLASSES, classes)
    except DAMAGED_ARRAYS as error:
        raise _unreadable(source, error) from error
    return _encoded(load_images(source), policy, tokenizer), load_labels(source)


def _from_parquet(source: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        table = pq.read_table(locate(source), columns=[TOKENS, PARQUET_CLASSES])
        tokens, classes = np.stack(table[TOKENS].to_numpy()), table[PARQUET_CLASSES].to_numpy()
    except (OSError, ValueError, TypeError, pa.ArrowException, MemoryError) as error:
        raise DataError(
            f"real tokens {source}: expected columns {TOKENS} (lists of one length) and "
            f"{PARQUET_CLASSES}: {error}"
        ) from error
    return _integers(source, TOKENS, tokens), _integers(source, PARQUET_CLASSES, classes)


def _integers(source: str, name: str, values: np.ndarray) -> np.ndarray:
    """As int64. Floats are refused: pandas makes them of columns with missing values."""
    if values.dtype.kind not in "iu":
        raise DataError(
            f"real tokens {source}: {name} must be integers, all rows, found {values.dtype}"
        )
    return values.astype(np.int64)


@torch.inference_mode()
def _encoded(images: np.ndarray, policy: Policy, config: TokenizerConfig) -> np.ndarray:
    """(N, H, W, 3) uint8 -> (N, T) int64 in the policy's order; encoded on the policy's device."""
    device = _device(policy)
    codes = encode_images(load_tokenizer(config, device=device), images, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the encoder's memory, for processes that share the GPU
    places = policy.codes(torch.arange(policy.num_tokens).view(1, -1).to(device))
    if places.numel() != codes.shape[1]:
        raise DataError(
            f"real images of {images.shape[1]} x {images.shape[2]} pixels give {codes.shape[1]} "
            f"tokens, but the policy draws {places.numel()}"
        )
    return codes[:, places.flatten().cpu().argsort()].numpy()


def encode_images(tokenizer: VQTokenizer, images: np.ndarray, device: torch.device) -> Tensor:
    """(N, H, W, 3) uint8 -> codes (N, T) int64 on the CPU, raster order; computed in fp32 on the
    tokenizer's device."""
    parts = []
    for at in range(0, len(images), ENCODED_AT_ONCE):
        pixels = torch.from_numpy(images[at : at + ENCODED_AT_ONCE]).to(device)
        parts.append(tokenizer.encode(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).flatten(1))
    return torch.cat(parts).cpu()


def _device(policy: Policy) -> torch.device:
    return next(iter(policy.state_dict().values())).device


def _check(source: str, tokens: np.ndarray, classes: np.ndarray, policy: Policy) -> None:
    wanted = f"(N, {policy.num_tokens})"
    if tokens.ndim != 2 or tokens.shape[1] != policy.num_tokens or not len(tokens):
        raise DataError(f"real tokens {source}: shape {tokens.shape}, expected {wanted}")
    if classes.shape != tokens.shape[:1]:
        raise DataError(
            f"real tokens {source}: {len(tokens)} images, but classes of shape {classes.shape}"
        )
    for label in (classes.min(), classes.max()):
        try:
            policy.encode([Condition(text="", class_index=int(label))])
        except DataError as error:
            raise DataError(f"real tokens {source}: {error}") from error
    if tokens.min() < 0 or tokens.max() >= policy.vocab_size:
        raise DataError(
            f"real tokens {source}: values {tokens.min()} to {tokens.max()}, expected 0 to "
            f"{policy.vocab_size - 1}"
        )
