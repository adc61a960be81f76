"""Triton's interpreter, corrected: it cuts fp32 off to bf16, where a GPU rounds to nearest even."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def _rounds_as_a_gpu() -> Iterator[None]:
    if torch.cuda.is_available():
        yield
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    builder, language = interpreter.InterpreterBuilder, interpreter.tl
    cut = builder.cast_impl

    def rounded(self: Any, source: Any, target: Any) -> Any:
        if (source.dtype.scalar, target.scalar) != (language.float32, language.bfloat16):
            return cut(self, source, target)
        exact = torch.from_numpy(np.ascontiguousarray(source.data))
        data = exact.to(torch.bfloat16).view(torch.uint16).numpy()
        return interpreter.TensorHandle(data, target.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "cast_impl", rounded)
        yield
