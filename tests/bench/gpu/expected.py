"""What each figure should be: results on any device, speeds by card.

Speeds are estimates until one is measured, and a slower one is no error: those of decoding, images,
steps, weights and iterations are 1.3 times what `learner.plan` computes for the card. Imports
nothing beyond the standard library.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import Enum

CARDS = ("H200", "H100")
"""Cards that have expectations of speed, by a part of their name."""


class Verdict(Enum):
    PASSED = "passed"
    SLOWER = "slower than expected"
    WRONG = "wrong"
    RECORDED = "recorded"
    """Nothing was expected of it."""


@dataclass(frozen=True)
class Expected:
    """A range, and what a value outside it is."""

    low: float = -math.inf
    high: float = math.inf
    miss: Verdict = Verdict.WRONG

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.low:g}"
        if math.isinf(self.high):
            return f">={self.low:g}"
        return f"<={self.high:g}" if math.isinf(self.low) else f"{self.low:g}..{self.high:g}"

    def judge(self, value: float) -> Verdict:
        """NaN is outside every range."""
        return Verdict.PASSED if self.low <= value <= self.high else self.miss


def at_most(limit: float) -> dict[str, Expected]:
    return {"": Expected(high=limit)}


def exactly(value: float) -> dict[str, Expected]:
    return {"": Expected(low=value, high=value)}


def within(h200: float, h100: float) -> dict[str, Expected]:
    """Seconds, at most."""
    return {
        "H200": Expected(high=h200, miss=Verdict.SLOWER),
        "H100": Expected(high=h100, miss=Verdict.SLOWER),
    }


def reaches(h200: float, h100: float) -> dict[str, Expected]:
    """A rate or a ratio, at least."""
    return {
        "H200": Expected(low=h200, miss=Verdict.SLOWER),
        "H100": Expected(low=h100, miss=Verdict.SLOWER),
    }


RECORDED: dict[str, Expected] = {}


def card_of(device_name: str) -> str:
    """The card of `CARDS` that a device's name holds as a word, or an empty string: a GH200 has
    none. An H100 of another form than SXM (PCIe, NVL) is expected to be as fast, and is slower."""
    return next((card for card in CARDS if re.search(rf"\b{card}\b", device_name)), "")


def expectation(figure: str, card: str, table: dict[str, dict[str, Expected]]) -> Expected | None:
    """What is expected of a figure on a card; None is nothing.

    Raises:
        KeyError: the table does not know the figure.
    """
    entry = table[figure]
    return entry.get(card) or entry.get("")


GAP, K3 = 0.03, 1e-3
"""Mean |logprob| between sampler and learner, nats, and the KL of mismatch: steps of GRPO stay
on-policy within them."""

EXPECTED: dict[str, dict[str, Expected]] = {
    # card
    "copy_tb_s": reaches(4.0, 3.0),
    "product_tflop_s": reaches(750, 650),
    # kernels
    "kernels_chosen": exactly(1),
    **{f"kernel_{kernel}_fp32_apart": at_most(2e-5) for kernel in ("attention", "norm", "gate")},
    **{f"kernel_{kernel}_bf16_apart": at_most(2**-6) for kernel in ("attention", "norm", "gate")},
    "kernel_draw_tokens_same": {"": Expected(low=0.999)},
    "kernel_draw_apart": at_most(1e-4),
    "kernel_attention_roofline": reaches(0.7, 0.7),
    # backends
    "cudnn_preferred": RECORDED,
    "attention_in_math": {card: Expected(high=0, miss=Verdict.SLOWER) for card in CARDS},
    "attention_apart": at_most(2**-6),
    "attention_gradient_apart": at_most(2**-5),
    # logprobs
    **{f"{rows}_logprob_gap": at_most(GAP) for rows in ("rows_24", "rows_512", "captions")},
    **{f"{rows}_k3": at_most(K3) for rows in ("rows_24", "rows_512", "captions")},
    "fp32_logprob_gap": at_most(GAP),
    # decode
    "decode_12_s": within(0.18, 0.19),
    "decode_128_s": within(0.44, 0.57),
    "decode_256_s": within(0.8, 1.05),
    "decode_12_roofline": RECORDED,
    "decode_128_roofline": reaches(0.6, 0.6),
    "decode_256_roofline": reaches(0.7, 0.7),
    "decode_128_torch_s": RECORDED,
    "official_generate_s": RECORDED,
    "generate_speedup": reaches(3, 3),
    # repeat
    "repeat_same": exactly(1),
    "new_weights_same": exactly(1),
    "new_weights_differ": exactly(1),
    "mid_weights_same": exactly(1),
    "mid_weights_differ": exactly(1),
    "fewer_rows_same": exactly(1),
    "rows_again_same": exactly(1),
    # beside
    "beside_tokens_same": exactly(1),
    "beside_levels_apart": exactly(0),
    # tests
    "tests_passed": {card: Expected(low=1) for card in CARDS},
    "tests_failed": exactly(0),
    # step
    "step_mismatch_kl": at_most(K3),
    "step_preset_s": within(1.2, 1.2),
    "step_plain_s": within(1.45, 1.45),
    "step_recomputed_s": within(2.25, 2.25),
    "step_default_same": RECORDED,
    "step_reproducible_same": exactly(1),
    "step_reproducible_s": RECORDED,
    # weights
    "snapshot_mib": RECORDED,
    "loaded_same": exactly(1),
    "loaded_on_device_same": exactly(1),
    "manifests_same": exactly(1),
    "pack_s": within(0.11, 0.11),
    "pack_on_device_s": within(0.01, 0.01),
    "load_s": within(0.11, 0.11),
    # scorers
    "hps_pixels_apart": at_most(1e-5),
    "hps_fp32_apart": at_most(1e-5),
    "hps_bf16_apart": at_most(2e-3),
    "hps_scores_vary": {card: Expected(low=1e-3) for card in CARDS},
    "hps_fp32_images_per_s": reaches(140, 140),
    "hps_bf16_images_per_s": reaches(900, 900),
    "clip_pixels_same": exactly(1),
    "clip_bf16_images_per_s": reaches(1500, 1500),
    "inception_pixels_apart": exactly(0),
    "inception_apart": at_most(1e-4),
    "inception_images_per_s": RECORDED,
    # images
    "images_fp32_s": RECORDED,
    "images_tf32_s": RECORDED,
    "images_tf32_levels": at_most(1),
    "images_bf16_s": within(0.16, 0.16),
    "images_bf16_mean_levels": at_most(2),
    "images_bf16_levels": RECORDED,
    # loo_fid
    "loo_fid_apart": at_most(1e-6),
    "loo_fid_cpu_s": RECORDED,
    "loo_fid_device_s": RECORDED,
    # iteration
    "iteration_sample_s": within(0.62, 0.77),
    "iteration_images_s": within(0.16, 0.16),
    "iteration_score_s": RECORDED,
    "iteration_moments_s": RECORDED,
    "iteration_learn_s": within(1.2, 1.2),
    "iteration_publish_s": within(0.21, 0.21),
    "iteration_s": within(2.6, 2.8),
    "iteration_images_per_s": RECORDED,
    "iteration_peak_gb": RECORDED,
    # public
    "ours_sample_s": within(0.62, 0.77),
    "theirs_sample_s": RECORDED,
    "ours_score_s": within(0.25, 0.25),
    "theirs_score_s": RECORDED,
    "ours_fid_s": RECORDED,
    "theirs_fid_s": RECORDED,
    "public_sample_ratio": reaches(3, 3),
    "public_score_ratio": RECORDED,
    "public_fid_ratio": RECORDED,
    "public_whole_ratio": reaches(5, 5),
    # miniature
    **{f"miniature_{way}_tokens_same": {"": Expected(low=0.98)} for way in ("inline", "ray")},
    **{f"miniature_{way}_entropy_gap": at_most(1e-3) for way in ("inline", "ray")},
}
"""Figure -> card -> what is expected of it; "" is any device."""
