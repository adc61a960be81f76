"""Cross-entropy on the tokens of real images, a regulariser (VA-pi uses it with weight 0.1)."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
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
from learner.data.datasets import image_captions, load_images, load_labels
from learner.data.named_sets import is_named
from rewards.images.sources import CLASSES as SAMPLE_CLASSES
from rewards.images.sources import SAMPLES

ENCODED_AT_ONCE = 32
TOKENS, CLASSES, CAPTIONS = "tokens", "classes", "captions"
PARQUET_CLASSES, PARQUET_CAPTIONS = "class_index", "caption"


@dataclass(frozen=True, kw_only=True)
class RealTokensConfig:
    """Cross-entropy on real images' tokens, added to the loss."""

    weight: float = 0.0
    """Weight of the mean cross-entropy (nats a token); 0: none."""
    source: str = "digits:train"
    """Real images with classes: "digits:train", an .npz with uint8 images arr_0 and classes arr_1
    (encoded with the tokenizer when the learner starts), or ready tokens: an .npz with tokens (N,
    T), in the policy's order, and classes (N,), or a .parquet with tokens and class_index. In a run
    on captions: with captions, some of the run's: "digits:train", an .npz with captions (N,) in
    place of classes, or a .parquet with tokens and caption."""
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
    """Token grids of real images and their classes or captions.

    Raises:
        DataError: a source that cannot be read, or does not fit the policy.
    """

    def __init__(
        self,
        config: RealTokensConfig,
        policy: Policy,
        tokenizer: TokenizerConfig,
        seed: int = 0,
        captions: Sequence[Condition] = (),
    ) -> None:
        """seed: the run's. captions: the run's, with what the policy reads of them; empty: classes
        are the conditions."""
        self.tokens, labels = _load(config.source, policy, tokenizer, captioned=bool(captions))
        _check(config.source, self.tokens, labels, policy)
        self.conditions = (
            _with_captions(config.source, labels.tolist(), captions)
            if captions
            else _with_classes(config.source, labels.tolist(), policy)
        )
        """One of each image; equal ones are one object."""
        self._size, self._seed = config.batch, seed

    def draw(self, iteration: int, update: int) -> tuple[np.ndarray, tuple[Condition, ...]]:
        """Tokens (B, T) int64 and conditions of one optimizer step, drawn with replacement as a
        function of (seed, iteration, update)."""
        key = [self._seed, zlib.crc32(b"real tokens")]
        generator = np.random.Generator(
            np.random.Philox(key=key, counter=[0, 0, update, iteration])
        )
        index = generator.integers(0, len(self.tokens), self._size)
        return self.tokens[index], tuple(self.conditions[at] for at in index)


def check_source(source: str, *, captioned: bool = False) -> None:
    """Check that a source exists and has the arrays that are read; reads headers only, but of named
    images.

    Args:
        captioned: captions are the conditions, not classes.

    Raises:
        DataError, CheckpointError: it does not.
    """
    if is_named(source):
        image_captions(source) if captioned else load_images(source)
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
    if table:
        wanted = TOKENS, PARQUET_CAPTIONS if captioned else PARQUET_CLASSES
    elif TOKENS in names:
        wanted = TOKENS, CAPTIONS if captioned else CLASSES
    else:
        wanted = SAMPLES, CAPTIONS if captioned else SAMPLE_CLASSES
    if lacking := [name for name in wanted if name not in names]:
        raise DataError(f"{source}: expected {' and '.join(wanted)}, found no {', '.join(lacking)}")


def _unreadable(source: str, error: Exception) -> DataError:
    return DataError(f"real tokens {source}: not a readable file ({error}): write it again")


def _load(
    source: str, policy: Policy, tokenizer: TokenizerConfig, *, captioned: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (N, T) int64, and classes (N,) int64 or captions (N,) str."""
    if is_named(source):
        labels = np.array(image_captions(source)) if captioned else load_labels(source)
        return _encoded(load_images(source), policy, tokenizer), labels
    if presumed_kind(locate(source)) is FileKind.PARQUET:
        return _from_parquet(source, captioned=captioned)
    name = CAPTIONS if captioned else CLASSES
    try:
        with np.load(locate(source), allow_pickle=False) as file:
            found = {key: file[key] for key in (TOKENS, name) if key in file}
    except DAMAGED_ARRAYS as error:
        raise _unreadable(source, error) from error
    if captioned and name not in found:
        raise DataError(f"real tokens {source}: expected {name} of its images, found none")
    ready = TOKENS in found and name in found
    tokens = (
        _integers(source, TOKENS, found[TOKENS])
        if ready
        else _encoded(load_images(source), policy, tokenizer)
    )
    if ready or captioned:
        return tokens, _labels(source, name, found[name], captioned=captioned)
    return tokens, load_labels(source)


def _from_parquet(source: str, *, captioned: bool) -> tuple[np.ndarray, np.ndarray]:
    name = PARQUET_CAPTIONS if captioned else PARQUET_CLASSES
    try:
        table = pq.read_table(locate(source), columns=[TOKENS, name])
        tokens, labels = np.stack(table[TOKENS].to_numpy()), table[name].to_numpy()
    except (OSError, ValueError, TypeError, pa.ArrowException, MemoryError) as error:
        raise DataError(
            f"real tokens {source}: expected columns {TOKENS} (lists of one length) and "
            f"{name}: {error}"
        ) from error
    tokens = _integers(source, TOKENS, tokens)
    return tokens, _labels(source, name, labels, captioned=captioned)


def _labels(source: str, name: str, values: np.ndarray, *, captioned: bool) -> np.ndarray:
    if not captioned:
        return _integers(source, name, values)
    for at, text in enumerate(values.ravel().tolist()):
        if not isinstance(text, str):
            raise DataError(
                f"real tokens {source}: {name} must be text, all rows, found {text!r} of image {at}"
            )
    return values


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


def _check(source: str, tokens: np.ndarray, labels: np.ndarray, policy: Policy) -> None:
    wanted = f"(N, {policy.num_tokens})"
    if tokens.ndim != 2 or tokens.shape[1] != policy.num_tokens or not len(tokens):
        raise DataError(f"real tokens {source}: shape {tokens.shape}, expected {wanted}")
    if labels.shape != tokens.shape[:1]:
        kind = CLASSES if labels.dtype.kind in "iu" else CAPTIONS
        raise DataError(
            f"real tokens {source}: {len(tokens)} images, but {kind} of shape {labels.shape}"
        )
    if tokens.min() < 0 or tokens.max() >= policy.vocab_size:
        raise DataError(
            f"real tokens {source}: values {tokens.min()} to {tokens.max()}, expected 0 to "
            f"{policy.vocab_size - 1}"
        )


def _with_classes(source: str, classes: Sequence[int], policy: Policy) -> list[Condition]:
    distinct = {each: Condition(text="", class_index=each) for each in set(classes)}
    try:
        policy.encode([distinct[min(distinct)], distinct[max(distinct)]])
    except DataError as error:
        raise DataError(f"real tokens {source}: {error}") from error
    return [distinct[each] for each in classes]


def _with_captions(
    source: str, texts: Sequence[str], captions: Sequence[Condition]
) -> list[Condition]:
    known = {each.text: each for each in reversed(captions)}  # the first of equal texts
    for at, text in enumerate(texts):
        if text not in known:
            raise DataError(
                f"real tokens {source}: the caption of image {at}, {text!r}, is none of the file "
                "conditions.captions, whose features the policy reads: add it there"
            )
    return [known[text] for text in texts]
