"""Discriminators of image tokenizers: StyleGAN2's, which judges a picture, and PatchGAN's, which judges its patches.

Sources: Karras et al. 2020 (StyleGAN2, arXiv 1912.04958); Isola et al. 2017 (pix2pix, arXiv 1611.07004).
Letters: b pictures, c channels, d features, h w rows and columns.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.checks import check_shape, choose

KINDS = ("style", "patch")
LARGEST_GROUP = 4  # pictures whose spread StyleGAN2's last feature tells


def leaky(x: Tensor) -> Tensor:
    """Return leaky ReLU times sqrt(2), which keeps the variance."""
    return F.leaky_relu(x, 0.2) * math.sqrt(2)


class EqualizedConv(nn.Module):
    """A convolution whose weights are normal at the start and scaled when used, so that all layers learn at one speed.

    Args:
        d_in, d: features.
        kernel: side; odd.
        stride: of the convolution; 2 comes behind a blur.
        is_linear: no bias and no activation.
    """

    def __init__(self, d_in: int, d: int, kernel: int, stride: int = 1, is_linear: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d, d_in, kernel, kernel))
        self.bias = None if is_linear else nn.Parameter(torch.zeros(d))
        self.scale, self.kernel, self.stride = (d_in * kernel**2) ** -0.5, kernel, stride
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.register_buffer("blur", taps.outer(taps) / 64, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return features [b, d, h', w'], h' = h / stride."""
        pad = self.kernel // 2
        if self.stride > 1:
            d, room = x.shape[1], (4 - self.stride + self.kernel - 1) // 2
            kernel = self.get_buffer("blur").to(x.dtype).expand(d, 1, 4, 4)
            x, pad = F.conv2d(x, kernel, padding=room, groups=d), 0
        x = F.conv2d(x, self.weight * self.scale, self.bias, stride=self.stride, padding=pad)
        return x if self.bias is None else leaky(x)


class EqualizedLinear(nn.Module):
    """A linear layer with weights scaled when used.

    Args:
        d_in, d: features.
        is_active: whether an activation follows.
    """

    def __init__(self, d_in: int, d: int, is_active: bool) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(d, d_in)), nn.Parameter(torch.zeros(d))
        self.scale, self.is_active = d_in**-0.5, is_active

    def forward(self, x: Tensor) -> Tensor:
        """Return [b, d]."""
        x = F.linear(x, self.weight * self.scale, self.bias)
        return leaky(x) if self.is_active else x


class StyleBlock(nn.Module):
    """Two convolutions, the second halving the sides, and a shortcut: [b, d_in, h, w] -> [b, d, h / 2, w / 2]."""

    def __init__(self, d_in: int, d: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = EqualizedConv(d_in, d_in, 3), EqualizedConv(d_in, d, 3, stride=2)
        self.skip = EqualizedConv(d_in, d, 1, stride=2, is_linear=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return the smaller features."""
        return (self.conv2(self.conv1(x)) + self.skip(x)) / math.sqrt(2)


class StyleDiscriminator(nn.Module):
    """StyleGAN2's discriminator: one logit per picture.

    Args:
        image_size: side of the pictures, a power of two from 8.
        in_channels: c.
        width: features at 4 to 32 pixels a side; halved with every doubling beyond 64.

    Raises:
        ValueError: for another side.
    """

    def __init__(self, image_size: int, in_channels: int = 3, width: int = 512) -> None:
        super().__init__()
        stages = int(math.log2(image_size)) if image_size > 0 else 0
        if 2**stages != image_size or stages < 3:
            raise ValueError(f"StyleDiscriminator: image_size must be a power of two from 8, got {image_size}.")
        widths = [width if s <= 6 else max(width >> (s - 6), 1) for s in range(stages, 1, -1)]
        self.image_size, self.in_channels = image_size, in_channels
        self.stem = EqualizedConv(in_channels, widths[0], 1)
        self.blocks = nn.ModuleList(StyleBlock(a, b) for a, b in itertools.pairwise(widths))
        self.last = EqualizedConv(widths[-1] + 1, width, 3)
        self.hidden = EqualizedLinear(16 * width, width, True)
        self.logit = EqualizedLinear(width, 1, False)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [b] of pictures [b, c, h, w]."""
        side = self.image_size
        check_shape(images, "StyleDiscriminator: images", "b c h w", c=self.in_channels, h=side, w=side)
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        x = self.last(torch.cat([x, batch_spread(x)], dim=1))
        return self.logit(self.hidden(x.flatten(1))).squeeze(1)


def batch_spread(x: Tensor) -> Tensor:
    """Return one feature [b, 1, h, w]: how far pictures of a group differ, the mean over features and places.

    Groups have about four pictures, all of one size.
    """
    b = len(x)
    group = b // max(b // LARGEST_GROUP, 1)
    while b % group:
        group -= 1
    parts = x.unflatten(0, (group, b // group))
    spread = (parts.var(0, unbiased=False) + 1e-8).sqrt().mean((1, 2, 3))
    return spread.repeat(group)[:, None, None, None].expand(-1, 1, *x.shape[2:])


class PatchDiscriminator(nn.Module):
    """PatchGAN's discriminator: a logit for every patch.

    Args:
        in_channels: c.
        width: features of the first layer; doubled with every layer, up to eight times.
        num_layers: layers behind the first; all but the last halve the sides.
    """

    def __init__(self, in_channels: int = 3, width: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        self.in_channels = in_channels
        layers: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        last = width
        for i in range(1, num_layers + 1):
            d = width * min(2**i, 8)
            layers += [nn.Conv2d(last, d, 4, 2 if i < num_layers else 1, 1, bias=False), nn.BatchNorm2d(d), nn.LeakyReLU(0.2)]
            last = d
        self.main = nn.Sequential(*layers, nn.Conv2d(last, 1, 4, 1, 1))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw kernels from N(0, 0.02^2), the norms' factors from N(1, 0.02^2)."""
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [b, 1, h', w'] of pictures [b, c, h, w]."""
        check_shape(images, "PatchDiscriminator: images", "b c h w", c=self.in_channels)
        return self.main(images)


def build_discriminator(kind: str, image_size: int, width: int | None = None) -> nn.Module:
    """Build a discriminator of RGB pictures.

    Args:
        kind: "style" or "patch".
        image_size: side of the pictures.
        width: features; the published number if None.

    Raises:
        ValueError: for an unknown kind.
    """
    choose(kind, KINDS, "discriminator")
    options = {} if width is None else {"width": width}
    return StyleDiscriminator(image_size, **options) if kind == "style" else PatchDiscriminator(**options)


class LeCam(nn.Module):
    """Keeps logits near the running means of the other side: helps where pictures are few.

    mean relu(real - e_fake)^2 + mean relu(e_real - fake)^2, e the averages of mean logits

    Source: Tseng et al. 2021 (arXiv 2104.03310).

    Args:
        decay: of the averages.
    """

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("means", torch.zeros(2))

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """Move the averages, then return the scalar term of logits."""
        means = self.get_buffer("means")
        with torch.no_grad():
            means.lerp_(torch.stack([real.float().mean(), fake.float().mean()]), 1 - self.decay)
        e_real, e_fake = means.clone().unbind()
        return F.relu(real.float() - e_fake).square().mean() + F.relu(e_real - fake.float()).square().mean()


def gradient_penalty(discriminator: nn.Module, real: Tensor) -> Tensor:
    """Return R1, the mean over pictures of |gradient of the logit at real pictures|^2, with a graph.

    Source: Mescheder et al. 2018 (arXiv 1801.04406).
    """
    images = real.detach().requires_grad_(True)
    with torch.autocast(real.device.type, enabled=False):
        (gradient,) = torch.autograd.grad(discriminator(images.float()).sum(), images, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last: Tensor) -> Tensor:
    """Return |d reconstruction / d last| / |d adversarial / d last|, the ratio of two losses' gradients at the decoder's last layer.

    Args:
        reconstruction, adversarial: scalar losses with a graph.
        last: parameter of the decoder's last layer.

    Source: Esser et al. 2021 (VQGAN, arXiv 2012.09841), equation 7.
    """
    norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial)]
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4).detach()


def logit_laplace(mean: Tensor, pixels: Tensor, log_scale: Tensor | float = 0.0, margin: float = 0.1) -> Tensor:
    """Return the mean negative log-likelihood of pixels in [0, 1] under the logit-Laplace distribution.

    -log p = |logit(y) - mean| / b + log(2 b y (1 - y)), y = (1 - 2 margin) x + margin, b = exp(log_scale)

    Args:
        mean: of the logits, what the network makes; `(sigmoid(mean) - margin) / (1 - 2 margin)` is its picture.
        pixels: of the same shape.
        log_scale: of the same shape, or one number.
        margin: keeps logits finite.

    Source: Ramesh et al. 2021 (DALL-E, arXiv 2102.12092), appendix A.3.
    """
    y = (1 - 2 * margin) * pixels.float() + margin
    scale = torch.as_tensor(log_scale, dtype=torch.float32, device=mean.device)
    return ((torch.logit(y) - mean.float()).abs() / scale.exp() + math.log(2) + scale + (y * (1 - y)).log()).mean()
