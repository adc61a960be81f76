"""The default system: LlamaGen, conditional on classes, on the 8x8 digits."""

from __future__ import annotations

from functools import partial

from actors.models.llamagen import LlamaGenConfig
from learner.miniature.systems import digits, trainers
from learner.miniature.systems.system import POLICY, TOKENIZER, System

ARCHITECTURE = LlamaGenConfig(
    dim=96,
    num_layers=4,
    num_heads=4,
    grid=4,
    vocab_size=digits.VQ.codebook_size,
    num_classes=digits.CLASSES,
)

LLAMAGEN = System(
    name="llamagen",
    preset="miniature",
    networks=(
        digits.TOKENIZER_NETWORK,
        digits.OF_DIGITS(
            name="policy",
            file=POLICY,
            steps=600,
            train=partial(trainers.policy, architecture=ARCHITECTURE, tokenizer=TOKENIZER),
        ),
        *digits.SCORERS,
        *digits.JUDGES,
    ),
    places={
        "policy": {"checkpoint": POLICY},
        "tokenizer": {"checkpoint": TOKENIZER},
        "rewards": digits.REWARDS,
    },
)
