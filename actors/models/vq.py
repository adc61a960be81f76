"""The VQ tokenizers of LlamaGen and taming: images to a grid of codes, and codes to images.

Parameter names are those of LlamaGen's `VQ_16`/`VQ_8` checkpoints; `actors.checkpoints.taming`
renames those of taming's VQGAN (Esser et al. 2020, 2012.09841). The two differ in `VQConfig` alone:
LlamaGen's codebook is normalised at lookup and at encoding, never in place.

Shapes: B batch, h w code grid, H W pixels, z latent channels. Images are (B, 3, H, W) in [-1, 1].
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actors.kernels.attention import full_attention
from cluster.errors import ConfigError

PixelRule = Literal["llamagen", "taming"]
PIXEL_RULES: tuple[PixelRule, ...] = ("llamagen", "taming")

NORM_GROUPS = 32
NORM_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class VQConfig:
    """Architecture of a VQ tokenizer; the defaults are VQ-16's."""

    family: ClassVar[str] = "llamagen-vq"

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channels of each resolution, finest first. Each but the last is followed by a 2x step."""
    num_res_blocks: int = 2
    """Of each resolution of the encoder; the decoder has one more. 0: no change of width."""
    z_channels: int = 256
    codebook_size: int = 16384
    codebook_dim: int = 8
    normalise: bool = True
    """Compare codes by cosine (LlamaGen); else by distance (taming)."""
    attention_levels: tuple[int, ...] | None = None
    """Resolutions with attention, as indices of `multipliers`; None is the coarsest alone."""
    pixel_rule: PixelRule = "llamagen"
    """Rounding to uint8: the two projects differ by half a level."""

    def __post_init__(self) -> None:
        if self.pixel_rule not in PIXEL_RULES:
            raise ConfigError(
                f"pixel_rule {self.pixel_rule!r} is unknown: choose one of {', '.join(PIXEL_RULES)}"
            )
        if not self.num_res_blocks and set(self.multipliers) != {1}:
            raise ConfigError(
                "num_res_blocks 0 leaves no block that changes the width: expected multipliers of "
                f"1, found {self.multipliers}"
            )
        if not self.attention_at <= set(range(len(self.multipliers))):
            raise ConfigError(
                f"attention_levels {self.attention_levels} name a resolution that "
                f"{len(self.multipliers)} multipliers do not have"
            )

    @property
    def attention_at(self) -> set[int]:
        """The levels with attention, 0 the finest."""
        if self.attention_levels is None:
            return {len(self.multipliers) - 1}
        return set(self.attention_levels)

    @property
    def downsampling(self) -> int:
        """Pixels per code, along one side."""
        return 2 ** (len(self.multipliers) - 1)

    def to_dict(self) -> dict[str, Any]:
        return {"family": self.family, **dataclasses.asdict(self)}


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, channels, eps=NORM_EPS)


class ResBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = _norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = _norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv1(F.silu(self.norm1(x)))
        inner = self.conv2(F.silu(self.norm2(inner)))
        return inner + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """One head over all positions of the map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        query, key, value = (
            layer(normed).flatten(2).transpose(1, 2).unsqueeze(1)
            for layer in (self.q, self.k, self.v)
        )
        mixed = full_attention(query, key, value)
        return x + self.proj_out(mixed.squeeze(1).transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Halve the map; pads right and bottom only, as the official code does."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Blocks of one resolution: residual blocks, attention at some levels, then a 2x step."""

    def __init__(
        self, inputs: int, outputs: int, blocks: int, attention: bool, step: nn.Module | None
    ) -> None:
        super().__init__()
        self.res = nn.ModuleList(
            ResBlock(inputs if index == 0 else outputs, outputs) for index in range(blocks)
        )
        self.attn = nn.ModuleList(AttnBlock(outputs) for _ in range(blocks if attention else 0))
        if isinstance(step, Downsample):
            self.downsample = step
        elif isinstance(step, Upsample):
            self.upsample = step
        self._step = [step] if step is not None else []  # in a list: registered under one name only

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        for step in self._step:
            x = step(x)
        return x


def _middle(channels: int) -> nn.ModuleList:
    return nn.ModuleList(
        [ResBlock(channels, channels), AttnBlock(channels), ResBlock(channels, channels)]
    )


class ConvEncoder(nn.Module):
    """(B, 3, H, W) -> (B, z, h, w)."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = [config.channels * multiplier for multiplier in config.multipliers]
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        for index, (inputs, outputs) in enumerate(zip([config.channels, *widths], widths)):
            step = None if index == len(widths) - 1 else Downsample(outputs)
            attention = index in config.attention_at
            self.conv_blocks.append(Level(inputs, outputs, config.num_res_blocks, attention, step))
        self.mid = _middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for module in (*self.conv_blocks, *self.mid):
            x = module(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class ConvDecoder(nn.Module):
    """(B, z, h, w) -> (B, 3, H, W)."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = [config.channels * multiplier for multiplier in reversed(config.multipliers)]
        self.conv_in = nn.Conv2d(config.z_channels, widths[0], 3, padding=1)
        self.mid = _middle(widths[0])
        self.conv_blocks = nn.ModuleList()
        for index, (inputs, outputs) in enumerate(zip([widths[0], *widths], widths)):
            level = len(widths) - 1 - index
            step = None if level == 0 else Upsample(outputs)
            blocks, attention = config.num_res_blocks + 1, level in config.attention_at
            self.conv_blocks.append(Level(inputs, outputs, blocks, attention, step))
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)
        for module in (*self.mid, *self.conv_blocks):
            x = module(x)
        x = x.to(self.conv_out.weight.dtype)  # fp32, see `VQDecoder.decode_in`
        return self.conv_out(F.silu(self.norm_out(x)))


class Codebook(nn.Module):
    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.normalise = config.normalise
        self.embedding = nn.Embedding(config.codebook_size, config.codebook_dim)

    def vectors(self) -> Tensor:
        """(codebook_size, codebook_dim), of unit length where the codebook is normalised."""
        weight = self.embedding.weight
        return F.normalize(weight, dim=-1) if self.normalise else weight

    def nearest(self, latents: Tensor) -> Tensor:
        """(B, codebook_dim, h, w) -> (B, h, w) int64: the closest row.

        By squared distance, less the latent's own norm, which is the same for every row. Between
        unit vectors the largest cosine says the same.
        """
        rows = self.vectors()
        if self.normalise:
            return torch.einsum("bchw,vc->bhwv", F.normalize(latents, dim=1), rows).argmax(-1)
        products = torch.einsum("bchw,vc->bhwv", latents, rows)
        return (rows.square().sum(-1) - 2 * products).argmin(-1)


class VQDecoder(nn.Module):
    """Codes to images: the half of the tokenizer that a sampler needs."""

    UNUSED: tuple[str, ...] = ("encoder.", "quant_conv.", "quantize.codebook_used")
    """Tensors of a tokenizer file that this half leaves out."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.quantize = Codebook(config)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.z_channels, 1)
        self.decoder = ConvDecoder(config)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """(B, codebook_dim, h, w), already quantised -> (B, 3, H, W), about [-1, 1]."""
        return self.decoder(self.post_quant_conv(latents))

    def forward(self, codes: Tensor) -> Tensor:
        """(B, h, w) integers -> (B, 3, H, W) float, about [-1, 1]."""
        latents = F.embedding(codes, self.quantize.vectors()).permute(0, 3, 1, 2)
        return self.decode_latents(latents.to(self.post_quant_conv.weight.dtype))

    def decode_in(self, dtype: torch.dtype) -> None:
        """Compute images in `dtype` from now on. In half precision, the codebook and the layers
        that the pixels come out of stay fp32, and convolutions have their channels last, as tensor
        cores read them."""
        if dtype == torch.float32:
            return
        decoder = self.decoder
        for part in (self.post_quant_conv, decoder.conv_in, decoder.mid, decoder.conv_blocks):
            part.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def pixels(self, codes: Tensor, size: int = 0) -> Tensor:
        """(B, h, w) integers -> (B, H, W, 3) uint8, by this tokenizer's own rule.

        Args:
            size: height and width of the images, which are resized to it; 0 leaves them as they are
                decoded.
        """
        return to_uint8(resized(self(codes), size), self.config.pixel_rule)


class VQTokenizer(VQDecoder):
    """The whole tokenizer, official names. Encoding serves building and real-token losses."""

    UNUSED = ("quantize.codebook_used",)

    def __init__(self, config: VQConfig) -> None:
        super().__init__(config)
        self.encoder = ConvEncoder(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_dim, 1)

    def encode_latents(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, codebook_dim, h, w), before normalisation."""
        return self.quant_conv(self.encoder(images))

    def nearest_codes(self, latents: Tensor) -> Tensor:
        """(B, codebook_dim, h, w) -> (B, h, w) int64: the closest row of the codebook."""
        return self.quantize.nearest(latents)

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, h, w) int64 codes."""
        return self.nearest_codes(self.encode_latents(images))


def resized(images: Tensor, size: int) -> Tensor:
    """(B, 3, H, W) decoder output -> (B, 3, size, size) fp32; unchanged where size is 0 or theirs.

    As LlamaGen's `sample_c2i_ddp.py --image-size-eval` has it: bicubic without antialias, on the
    decoder's output, before it is clamped and rounded. Evaluators' numbers depend on both.
    """
    if not size or images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images.float(), size=(size, size), mode="bicubic")


def to_uint8(images: Tensor, rule: PixelRule = "llamagen") -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8.

    LlamaGen cuts off the fraction of 127.5 x + 128, taming that of 255 (x + 1) / 2. Where the rule
    belongs to a tokenizer, use `VQDecoder.pixels`.
    """
    # In the order of the official operations: another rounding moves values across a whole level.
    if rule == "taming":
        levels = (images.float().clamp(-1, 1) + 1) / 2 * 255
    else:
        levels = torch.clamp(127.5 * images.float() + 128.0, 0, 255)
    return levels.permute(0, 2, 3, 1).to(torch.uint8)
