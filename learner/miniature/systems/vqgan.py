"""taming's system on the 8x8 digits: its VQGAN, without discriminator, and its GPT of classes.

The scorers are those of the other systems on the digits, and so is LlamaGen's tokenizer, which the
preference model's training needs.
"""

from __future__ import annotations

from functools import partial

from actors.models.taming import TamingConfig
from actors.models.vq import VQConfig
from learner.miniature.systems import digits, trainers
from learner.miniature.systems.system import POLICY, TOKENIZER, System
from learner.miniature.training import TAMING_LOSS

VQ = VQConfig(
    channels=32,
    multipliers=(1, 1),
    num_res_blocks=1,
    z_channels=32,
    codebook_size=64,
    codebook_dim=32,  # taming's is as wide as its latents
    normalise=False,
    attention_levels=(1,),
    pixel_rule="taming",
)
ARCHITECTURE = TamingConfig(
    dim=96,
    num_layers=4,
    num_heads=4,
    grid=4,
    block_size=16,
    vocab_size=VQ.codebook_size,
    num_classes=digits.CLASSES,
)
VQGAN_TOKENIZER, VQGAN_POLICY = f"vqgan/{TOKENIZER}", f"vqgan/{POLICY}"

VQGAN = System(
    name="vqgan",
    preset="miniature-vqgan",
    networks=(
        digits.TOKENIZER_NETWORK,
        *digits.SCORERS,
        digits.OF_DIGITS(
            name="vqgan/tokenizer",
            file=VQGAN_TOKENIZER,
            steps=1800,
            train=partial(trainers.tokenizer, config=VQ, objective=TAMING_LOSS),
        ),
        digits.OF_DIGITS(
            name="vqgan/policy",
            file=VQGAN_POLICY,
            steps=600,
            train=partial(trainers.policy, architecture=ARCHITECTURE, tokenizer=VQGAN_TOKENIZER),
        ),
    ),
    places={
        "policy": {"checkpoint": VQGAN_POLICY},
        "tokenizer": {"checkpoint": VQGAN_TOKENIZER},
        "rewards": digits.REWARDS,
    },
)
