"""How the processes of a run compute: exact float32 arithmetic, and reproducible results on GPUs.

All settings are global to the process and other threads may be computing, so they are set once, at
the start of every process that computes, and never reset.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cluster.errors import ConfigError

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
FIXED_WORKSPACES = (":4096:8", ":16:8")
"""Values with which cuBLAS gives equal results; torch refuses to compute with others."""
NCCL_ALGORITHM = "NCCL_ALGO"
DETERMINISTIC = {CUBLAS_WORKSPACE: FIXED_WORKSPACES[0], NCCL_ALGORITHM: "Ring"}
"""Environment of reproducible processes. NCCL's sums in switches (NVLS) have no fixed order."""


def exact_fp32() -> None:
    """Turn off TF32 for matrix products and convolutions (cuDNN's default), since features, scores
    and logprobs are compared across devices and programs."""
    # The old switches first: with the new ones alone, torch refuses to tell the old.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    for place in fp32_flags().values():
        place.fp32_precision = "ieee"


def fp32_flags() -> dict[str, torch.backends._FP32Precision]:
    """What `exact_fp32` sets: name -> owner of `fp32_precision`."""
    cudnn = torch.backends.cudnn
    return {
        "products": torch.backends.cuda.matmul,  # type: ignore[dict-item]
        "convolutions": cudnn.conv,  # type: ignore[attr-defined]
        "recurrences": cudnn.rnn,  # type: ignore[dict-item]
    }


def start_computing(*, reproducible: bool = False) -> None:
    """Set how this process computes. Called by every role before it loads a model.

    Args:
        reproducible: the option of that name; see `deterministic_algorithms`.

    Raises:
        ConfigError: as `deterministic_algorithms`.
    """
    exact_fp32()
    without_cudnn_attention()
    if reproducible:
        deterministic_algorithms()


def without_cudnn_attention() -> None:
    """Exclude cuDNN from `scaled_dot_product_attention`; flash and memory-efficient attention stay.

    On sm90 torch >= 2.11 prefers it. With a mask its gradient of the queries was NaN where the
    length is 64 modulo 128 (pytorch #196678), and masks of another dtype were misread (#191612).
    torch's switches belong to the process: one around each call would race with other threads.
    Attention is 2 to 4 % of the operations of a pass over 256 tokens: its speed hardly counts.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def deterministic_environment() -> None:
    """Set the variables that CUDA's libraries read when they start, for `deterministic_algorithms`.
    A program that looks at the GPU before it builds roles calls this first.

    Raises:
        ConfigError: the environment asks cuBLAS for other workspaces, or CUDA has started without.
    """
    found = os.environ.get(CUBLAS_WORKSPACE)
    if found not in (None, *FIXED_WORKSPACES):
        raise ConfigError(
            f"reproducible needs {CUBLAS_WORKSPACE} to be {' or '.join(FIXED_WORKSPACES)}, found "
            f"{found!r} in the environment: remove the variable, or leave out --reproducible"
        )
    if found is None and torch.cuda.is_initialized():
        raise ConfigError(
            f"reproducible needs {CUBLAS_WORKSPACE} before CUDA starts, and this process has "
            f"started it: set {CUBLAS_WORKSPACE}={FIXED_WORKSPACES[0]} in its environment"
        )
    for name, value in DETERMINISTIC.items():
        os.environ.setdefault(name, value)


def deterministic_algorithms() -> None:
    """Choose algorithms whose results do not depend on the order in which threads of a GPU finish.

    Covers cuBLAS, cuDNN, attention, Inductor and NCCL. An operation without such an algorithm
    raises: see `refusals_explained`. On a CPU the default operations are deterministic, and results
    do not change.

    Raises:
        ConfigError: as `deterministic_environment`.
    """
    deterministic_environment()
    torch.use_deterministic_algorithms(True)
    # Each `torch.empty` would be filled with NaN, in captured steps too; none is read unwritten.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def is_refusal(error: BaseException) -> bool:
    """Whether torch refused an operation that has no deterministic algorithm."""
    return isinstance(error, RuntimeError) and "use_deterministic_algorithms" in str(error)


def refusal(error: BaseException, what: str) -> ConfigError:
    """The error for a refused operation of `what`."""
    operation = " ".join(str(error).split()).partition(", but")[0]
    return ConfigError(
        f"reproducible: {what} cannot be computed reproducibly on this device ({operation}): "
        "leave out --reproducible, or this part of the run"
    )


@contextmanager
def refusals_explained(what: str) -> Iterator[None]:
    """Raise ConfigError, which names `what`, for an operation that torch refuses in the block."""
    try:
        yield
    except RuntimeError as error:
        if not is_refusal(error):
            raise
        raise refusal(error, what) from error
