"""The U-Nets behind EDM: SongUNet (DDPM++ and NCSN++) and DhariwalUNet (ADM), bare, without preconditioning.

Score-Based Generative Modeling through SDEs (Song et al. 2021, arXiv 2011.13456) and Diffusion Models Beat GANs (Dhariwal and Nichol
2021, arXiv 2105.05233), as Karras et al. 2022 (arXiv 2206.00364) use them. Modules carry the names of the official checkpoints.

- encoder outputs to be concatenated are counted when the network is built, so the graph does not depend on shapes at run time
- attention through `attend`: fused kernels, and forward mode where they have none
- 1x1 convolutions of an upsampling skip run before the upsampling

Legend: b batch, c channels, h w rows and columns, d width of the embedding, r resolution of a level.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.checks import choose
from genkit.generators.edm_layers import Resample, ResampleConv2d, UNetBlock, convolution, group_norm


def positional_embedding(noise: Tensor, width: int, include_end: bool) -> Tensor:
    """Return [cos, sin] of noise arguments [b] at `width` / 2 frequencies 10000^(-i/n); n counts one less if the end is included."""
    half = width // 2
    frequencies = (1 / 10000) ** (torch.arange(half, dtype=torch.float32, device=noise.device) / (half - (1 if include_end else 0)))
    angles = torch.outer(noise.float(), frequencies)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """[cos, sin] of noise arguments [b] at fixed random frequencies of standard deviation 16."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(width // 2) * 16)

    def forward(self, noise: Tensor) -> Tensor:
        angles = torch.outer(noise.float(), 2 * math.pi * self.get_buffer("freqs").float())
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class PositionalEmbedding(nn.Module):
    """`positional_embedding` as a module, so that hooks can see it."""

    def __init__(self, width: int, include_end: bool) -> None:
        super().__init__()
        self.width, self.include_end = width, include_end

    def forward(self, noise: Tensor) -> Tensor:
        return positional_embedding(noise, self.width, self.include_end)


def _check(where: str, image_size: int, channel_mult: Sequence[int]) -> None:
    """Refuse sizes that the levels cannot halve."""
    factor = 2 ** (len(channel_mult) - 1)
    if not channel_mult or image_size % factor:
        raise ValueError(f"{where}: image_size must be a multiple of {factor} for channel_mult={list(channel_mult)}, got {image_size}.")


class _UNet(nn.Module):
    """Runs blocks, with gradient checkpointing where diffusers' switch asks for it."""

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Tensor]

    def run(self, block: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
        """Evaluate a residual block or a plain convolution."""
        if not isinstance(block, UNetBlock):
            out: Tensor = block(x)
        elif self.gradient_checkpointing and torch.is_grad_enabled():
            out = self._gradient_checkpointing_func(block, x, emb)
        else:
            out = block(x, emb)
        return out


class LabelMap(nn.Module):
    """Where a label says things are: a map of label rows at the lowest level, and learned positions there and at the first level.

    Args:
        label_dim: width of label rows.
        channels: of the map.
        first_channels, last_channels: of the first and the lowest level.
        image_size: side of the first level.
        levels: number of levels.

    Raises:
        ValueError: without labels.
    """

    def __init__(self, label_dim: int, channels: int, first_channels: int, last_channels: int, image_size: int, levels: int) -> None:
        super().__init__()
        if not label_dim:
            raise ValueError("SongUNet: label_map needs labels (label_dim above 0).")
        self.side = image_size >> (levels - 1)
        self.first = nn.Parameter(torch.zeros(1, first_channels, image_size, image_size))
        self.last = nn.Parameter(torch.zeros(1, last_channels, self.side, self.side))
        self.project = nn.Linear(label_dim, channels * self.side**2)
        self.conv = nn.Conv2d(channels, last_channels, 3, padding=1)
        self.label_dim = label_dim

    def forward(self, labels: Tensor | None, count: int) -> Tensor:
        """Return what is added at the lowest level, [b, c', h', w'], for label rows [b, label_dim] or, for None, rows of zeros."""
        dtype = self.project.weight.dtype
        rows = self.last.new_zeros(count, self.label_dim) if labels is None else labels.to(dtype)
        layout = self.project(rows * math.sqrt(self.label_dim)).unflatten(1, (-1, self.side, self.side))
        return self.conv(F.silu(layout)) + self.last


class SongUNet(_UNet):
    """DDPM++ (`embedding_type="positional"`) and NCSN++ (fourier, residual encoder, taps [1, 3, 3, 1]).

    Args:
        image_size: side in pixels, names the levels.
        in_channels, out_channels: of pictures.
        label_dim: width of label vectors; 0 = none.
        augment_dim: width of augmentation vectors; 0 = none.
        model_channels: base width.
        channel_mult: width of each level, times the base.
        channel_mult_emb: width of the embedding, times the base.
        num_blocks: residual blocks of an encoder level; the decoder has one more.
        attn_resolutions: levels with attention, by side in pixels.
        dropout: in the blocks.
        embedding_type: "positional" or "fourier".
        channel_mult_noise: width of the noise embedding, times the base.
        encoder_type: "standard", "skip" or "residual".
        decoder_type: "standard" or "skip".
        resample_filter: taps of one axis.
        label_map: channels of a map that the label row is projected to at the lowest level, 0 = none as published; with it come learned
            positions there and at the first level (ours: a label then says where things are, not only what).

    Raises:
        ValueError: for unknown types and sizes that do not fit.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.1,
        embedding_type: Literal["positional", "fourier"] = "positional",
        channel_mult_noise: int = 1,
        encoder_type: Literal["standard", "skip", "residual"] = "standard",
        decoder_type: Literal["standard", "skip"] = "standard",
        resample_filter: Sequence[float] = (1, 1),
        label_map: int = 0,
    ) -> None:
        super().__init__()
        choose(embedding_type, ("positional", "fourier"), "SongUNet embedding_type")
        choose(encoder_type, ("standard", "skip", "residual"), "SongUNet encoder_type")
        choose(decoder_type, ("standard", "skip"), "SongUNet decoder_type")
        _check("SongUNet", image_size, channel_mult)
        self.label_dim, self.encoder_type, self.decoder_type = label_dim, encoder_type, decoder_type
        emb_dim, noise_dim = model_channels * channel_mult_emb, model_channels * channel_mult_noise
        taps = tuple(resample_filter)
        kwargs: dict[str, Any] = {"dropout": dropout, "skip_scale": math.sqrt(0.5), "eps": 1e-6, "project_resampled": True}
        kwargs |= {"taps": taps, "adaptive_scale": False}

        is_positional = embedding_type == "positional"
        self.map_noise: nn.Module = PositionalEmbedding(noise_dim, True) if is_positional else FourierEmbedding(noise_dim)
        self.map_label = nn.Linear(label_dim, noise_dim) if label_dim else None
        self.map_augment = nn.Linear(augment_dim, noise_dim, bias=False) if augment_dim else None
        self.map_layer0, self.map_layer1 = nn.Linear(noise_dim, emb_dim), nn.Linear(emb_dim, emb_dim)

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        skips, width, aux = [], in_channels, in_channels
        for level, mult in enumerate(channel_mult):
            r = image_size >> level
            if level == 0:
                self.enc[f"{r}x{r}_conv"] = convolution(width, model_channels, 3)
                width = model_channels
            else:
                self.enc[f"{r}x{r}_down"] = UNetBlock(width, width, emb_dim, resampling="down", **kwargs)
                if encoder_type == "skip":
                    self.enc[f"{r}x{r}_aux_down"] = Resample("down", taps)
                    self.enc[f"{r}x{r}_aux_skip"] = convolution(aux, width, 1)
                elif encoder_type == "residual":
                    self.enc[f"{r}x{r}_aux_residual"] = ResampleConv2d(aux, width, 3, "down", taps, fused=True)
                    aux = width
            skips.append(width)
            for i in range(num_blocks):
                heads = int(r in attn_resolutions)
                self.enc[f"{r}x{r}_block{i}"] = UNetBlock(width, model_channels * mult, emb_dim, heads=heads, **kwargs)
                width = model_channels * mult
                skips.append(width)
        self.layout = LabelMap(label_dim, label_map, model_channels, width, image_size, len(channel_mult)) if label_map else None
        for level, mult in reversed(list(enumerate(channel_mult))):
            r = image_size >> level
            if level == len(channel_mult) - 1:
                self.dec[f"{r}x{r}_in0"] = UNetBlock(width, width, emb_dim, heads=1, **kwargs)
                self.dec[f"{r}x{r}_in1"] = UNetBlock(width, width, emb_dim, **kwargs)
            else:
                self.dec[f"{r}x{r}_up"] = UNetBlock(width, width, emb_dim, resampling="up", **kwargs)
            for i in range(num_blocks + 1):
                heads = int(i == num_blocks and r in attn_resolutions)
                self.dec[f"{r}x{r}_block{i}"] = UNetBlock(width + skips.pop(), model_channels * mult, emb_dim, heads=heads, **kwargs)
                width = model_channels * mult
            if decoder_type == "skip" or level == 0:
                if decoder_type == "skip" and level < len(channel_mult) - 1:
                    self.dec[f"{r}x{r}_aux_up"] = Resample("up", taps)
                self.dec[f"{r}x{r}_aux_norm"] = group_norm(width, 1e-6)
                self.dec[f"{r}x{r}_aux_conv"] = convolution(width, out_channels, 3)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Xavier-uniform weights, biases 0; the last convolution of each residual branch and the outputs almost 0, qkv at sqrt(0.2)."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                last = name.rsplit(".", 1)[-1]
                is_small = last in ("conv1", "proj") or last.endswith("aux_conv")
                nn.init.xavier_uniform_(module.weight, 1e-5 if is_small else math.sqrt(0.2) if last == "qkv" else 1.0)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.layout is not None:
            nn.init.zeros_(self.layout.conv.weight)

    def embed(self, noise: Tensor, labels: Tensor | None, augment: Tensor | None) -> Tensor:
        """Return the embedding [b, d] of noise arguments [b], label rows and augmentation rows."""
        emb = self.map_noise(noise)
        emb = emb.unflatten(1, (2, -1)).flip(1).flatten(1).to(self.map_layer0.weight.dtype)  # the halves are swapped: sine first
        if self.map_label is not None:
            rows = emb.new_zeros(len(noise), self.label_dim) if labels is None else labels.to(emb.dtype)
            emb = emb + self.map_label(rows * math.sqrt(self.label_dim))
        if self.map_augment is not None and augment is not None:
            emb = emb + self.map_augment(augment.to(emb.dtype))
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor | None = None, augment: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Evaluate the network.

        Args:
            x: [b, c, h, w] scaled pictures.
            noise: [b] arguments of the noise embedding.
            labels: [b, label_dim]; None is a row of zeros.
            augment: [b, augment_dim] or None.

        Returns:
            Output [b, out_channels, h, w] and the lowest encoder activations [b, c', h', w'].
        """
        emb = self.embed(noise, labels, augment)
        skips: list[Tensor] = []
        aux = x
        for name, block in self.enc.items():
            if name.endswith("aux_down"):
                aux = block(aux)
            elif name.endswith("aux_skip"):
                x = skips[-1] = x + block(aux)
            elif name.endswith("aux_residual"):
                x = skips[-1] = aux = (x + block(aux)) / math.sqrt(2)
            else:
                x = self.run(block, x, emb)
                if self.layout is not None and not skips:
                    x = x + self.layout.first
                skips.append(x)
        if self.layout is not None:
            x = x + self.layout(labels, len(x))
        bottleneck, out, normed = x, None, x
        for name, block in self.dec.items():
            if name.endswith("aux_up"):
                out = block(out)
            elif name.endswith("aux_norm"):
                normed = block(x)
            elif name.endswith("aux_conv"):
                value = block(F.silu(normed))
                out = value if out is None else out + value
            else:
                x = self.run(block, torch.cat([x, skips.pop()], dim=1) if "_block" in name else x, emb)
        assert out is not None
        return out, bottleneck


class DhariwalUNet(_UNet):
    """ADM: adaptive scale, heads of 64 channels, unscaled residuals.

    Args:
        image_size: side in pixels, names the levels.
        in_channels, out_channels: of pictures.
        label_dim: width of label vectors; 0 = none.
        augment_dim: width of augmentation vectors; 0 = none.
        model_channels: base width.
        channel_mult: width of each level, times the base.
        channel_mult_emb: width of the embedding, times the base.
        num_blocks: residual blocks of an encoder level; the decoder has one more.
        attn_resolutions: levels with attention, by side in pixels.
        dropout: in the blocks.

    Raises:
        ValueError: for sizes that do not fit, among them fewer than 64 channels where attention is asked for.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        _check("DhariwalUNet", image_size, channel_mult)
        self.label_dim = label_dim
        emb_dim = model_channels * channel_mult_emb
        self.map_noise = PositionalEmbedding(model_channels, False)
        self.map_augment = nn.Linear(augment_dim, model_channels, bias=False) if augment_dim else None
        self.map_layer0, self.map_layer1 = nn.Linear(model_channels, emb_dim), nn.Linear(emb_dim, emb_dim)
        self.map_label = nn.Linear(label_dim, emb_dim, bias=False) if label_dim else None

        def block(dim_in: int, dim_out: int, attends: bool = False, **options: Any) -> UNetBlock:
            if attends and dim_out < 64:
                raise ValueError(f"DhariwalUNet: attention has heads of 64 channels, but a level with attention has {dim_out}.")
            return UNetBlock(dim_in, dim_out, emb_dim, heads=dim_out // 64 if attends else 0, dropout=dropout, **options)

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        skips, width = [], in_channels
        for level, mult in enumerate(channel_mult):
            r = image_size >> level
            if level == 0:
                self.enc[f"{r}x{r}_conv"] = convolution(width, model_channels * mult, 3)
                width = model_channels * mult
            else:
                self.enc[f"{r}x{r}_down"] = block(width, width, resampling="down")
            skips.append(width)
            for i in range(num_blocks):
                self.enc[f"{r}x{r}_block{i}"] = block(width, model_channels * mult, r in attn_resolutions)
                width = model_channels * mult
                skips.append(width)
        for level, mult in reversed(list(enumerate(channel_mult))):
            r = image_size >> level
            if level == len(channel_mult) - 1:
                self.dec[f"{r}x{r}_in0"] = block(width, width, attends=True)
                self.dec[f"{r}x{r}_in1"] = block(width, width)
            else:
                self.dec[f"{r}x{r}_up"] = block(width, width, resampling="up")
            for i in range(num_blocks + 1):
                self.dec[f"{r}x{r}_block{i}"] = block(width + skips.pop(), model_channels * mult, r in attn_resolutions)
                width = model_channels * mult
        self.out_norm, self.out_conv = group_norm(width, 1e-5), convolution(width, out_channels, 3)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Uniform weights and biases of variance 1 / (3 fan-in), as PyTorch draws them; residual branches, augmentation and output at 0."""
        for name, module in self.named_modules():
            if name.rsplit(".", 1)[-1] in ("conv1", "proj", "out_conv", "map_augment") and isinstance(module, nn.Linear | nn.Conv2d):
                for parameter in module.parameters():
                    nn.init.zeros_(parameter)
        if self.map_label is not None:
            nn.init.normal_(self.map_label.weight)

    def embed(self, noise: Tensor, labels: Tensor | None, augment: Tensor | None) -> Tensor:
        """Return the embedding [b, d] of noise arguments [b], label rows and augmentation rows."""
        emb = self.map_noise(noise).to(self.map_layer0.weight.dtype)
        if self.map_augment is not None and augment is not None:
            emb = emb + self.map_augment(augment.to(emb.dtype))
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None and labels is not None:
            emb = emb + self.map_label(labels.to(emb.dtype))
        return F.silu(emb)

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor | None = None, augment: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Evaluate the network; see `SongUNet.forward`."""
        emb = self.embed(noise, labels, augment)
        skips: list[Tensor] = []
        for block in self.enc.values():
            x = self.run(block, x, emb)
            skips.append(x)
        bottleneck = x
        for name, block in self.dec.items():
            x = self.run(block, torch.cat([x, skips.pop()], dim=1) if "_block" in name else x, emb)
        return self.out_conv(F.silu(self.out_norm(x))), bottleneck


UNETS: dict[str, type[SongUNet] | type[DhariwalUNet]] = {"song": SongUNet, "adm": DhariwalUNet}
