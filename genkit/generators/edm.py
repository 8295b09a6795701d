"""EDM denoisers: a U-Net inside a preconditioner, D(x; sigma, condition) -> clean picture.

Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., NeurIPS 2022, arXiv 2206.00364). Computes the numbers of
the official CIFAR-10, FFHQ, AFHQv2 and ImageNet-64 checkpoints and of their VP, VE and iDDPM baselines (`genkit convert edm`).

- the four published preconditioners around one of two networks, by configuration
- conditions: class ids, one-hot rows, or any vector (a pooled text embedding); None is the unconditional row of zeros
- patches (ours): pictures may enter as squares of pixels in channels, an orthogonal change that leaves the noise white
- one-step students (SIM and others) are the same network, evaluated once

Legend: b batch, c channels, h w rows and columns, l width of the condition.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor
from torch.nn import functional as F

from genkit.checks import check_shape, choose
from genkit.generators.edm_unet import UNETS
from genkit.generators.preconditioning import make_preconditioner

_CIFAR: dict[str, Any] = {"sample_size": 32, "augment_dim": 9}
_FACES: dict[str, Any] = {"sample_size": 64, "augment_dim": 9}
_VP: dict[str, Any] = {"name": "song"}
_VE: dict[str, Any] = {
    "name": "song", "embedding_type": "fourier", "encoder_type": "residual", "resample_filter": [1, 3, 3, 1], "channel_mult_noise": 2
}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "cifar10_vp": {**_CIFAR, "unet_config": {**_VP, "channel_mult": [2, 2, 2], "dropout": 0.13}},
    "cifar10_ve": {**_CIFAR, "unet_config": {**_VE, "channel_mult": [2, 2, 2], "dropout": 0.13}},
    "ffhq64_vp": {**_FACES, "unet_config": {**_VP, "channel_mult": [1, 2, 2, 2], "dropout": 0.05}},
    "ffhq64_ve": {**_FACES, "unet_config": {**_VE, "channel_mult": [1, 2, 2, 2], "dropout": 0.05}},
    "imagenet64_adm": {"sample_size": 64, "label_dim": 1000, "unet_config": {"name": "adm"}},
}
"""Published sizes; class-conditional CIFAR-10 has label_dim=10, AFHQv2 is FFHQ with dropout=0.25."""


@dataclass
class EDMOutput(BaseOutput):
    """What a denoiser returns.

    Attributes:
        sample: [b, c, h, w] denoised pictures, fp32.
        bottleneck: [b, c', h', w'] lowest activations of the encoder, for discriminators that read the network.
    """

    sample: Tensor
    bottleneck: Tensor | None = None  # a default, so that accelerate can rebuild the output


class EDMUNet2DModel(ModelMixin, ConfigMixin):
    """A preconditioned U-Net.

    Args:
        sample_size: side of the pictures in pixels.
        in_channels: c.
        label_dim: l, number of classes or width of the condition vector; 0 for an unconditional model.
        augment_dim: width of the vector that says how a training picture was augmented; 0 = none.
        unet_config: {"name": "song" or "adm", ...} with the arguments of `SongUNet` or `DhariwalUNet` beyond the sizes above.
        preconditioner_config: {"name": "edm", "vp", "ve" or "iddpm", ...} with its options.
        patch_size: side of the squares of pixels that enter as channels.

    Raises:
        ValueError: if sizes do not fit together or a name is unknown.

    Example:
        >>> unet = {"name": "song", "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1}
        >>> model = EDMUNet2DModel(sample_size=8, label_dim=3, unet_config=unet)
        >>> model(torch.randn(2, 3, 8, 8), torch.tensor([0.5, 2.0]), torch.tensor([0, 2])).sample.shape
        torch.Size([2, 3, 8, 8])
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["UNetBlock"]
    _repeated_blocks: ClassVar[list[str]] = ["UNetBlock"]

    @register_to_config
    def __init__(
        self,
        *,  # diffusers forgets values passed by position when a model is rebuilt from its config
        sample_size: int = 32,
        in_channels: int = 3,
        label_dim: int = 0,
        augment_dim: int = 0,
        unet_config: Mapping[str, Any] | None = None,
        preconditioner_config: Mapping[str, Any] | None = None,
        patch_size: int = 1,
    ) -> None:
        super().__init__()
        chosen = dict(unet_config or {"name": "song"})
        name = choose(chosen.pop("name", "song"), UNETS, "U-Net")
        conditioning = dict(preconditioner_config or {"name": "edm"})
        self.preconditioner = make_preconditioner(conditioning.pop("name", "edm"), **conditioning)
        if patch_size < 1 or sample_size % patch_size:
            raise ValueError(f"EDMUNet2DModel: patch_size must divide sample_size={sample_size}, got {patch_size}.")
        channels = in_channels * patch_size**2
        self.unet = UNETS[name](
            sample_size // patch_size, channels, channels * self.preconditioner.channels, label_dim, augment_dim, **chosen
        )

    def label_rows(self, labels: Tensor | None) -> Tensor | None:
        """Return condition rows [b, l] of class ids [b] or rows [b, l].

        Raises:
            ValueError: if the model takes none, or the shape or an id does not fit.
        """
        dim = self.config["label_dim"]
        if labels is None:
            return None
        if not dim:
            raise ValueError("EDMUNet2DModel: this model is unconditional; leave class_labels out.")
        if labels.ndim == 1 and not labels.is_floating_point():
            if not torch.compiler.is_compiling() and labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < dim:
                raise ValueError(f"EDMUNet2DModel: class ids must lie in 0 .. {dim - 1}, got {labels.tolist()[:8]}.")
            return F.one_hot(labels, dim).float()
        check_shape(labels, "EDMUNet2DModel: class_labels", "b l", l=dim)
        return labels

    def forward(
        self,
        sample: Tensor,
        sigma: Tensor | float,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> EDMOutput | tuple[Tensor, Tensor]:
        """Denoise.

        Args:
            sample: [b, c, h, w] = clean + sigma * noise, any floating type; fp32 inside up to the network, which computes in the type of
                its weights (as published: half-precision networks on full-precision states).
            sigma: noise level > 0, [b] or one number.
            class_labels: class ids [b], or rows [b, l]; None is unconditional.
            augment_labels: [b, a] for training pictures; None means not augmented.
            return_dict: False returns a tuple.

        Raises:
            ValueError: if shapes do not fit.
        """
        sizes = check_shape(sample, "EDMUNet2DModel: sample", "b c h w", c=self.config["in_channels"])
        x = sample.float()
        level = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).reshape(-1).expand(sizes["b"])
        c = self.preconditioner.coefficients(level)
        patch, channels = self.config["patch_size"], sample.shape[1] * self.config["patch_size"] ** 2
        network_input = (c.input.view(-1, 1, 1, 1) * x).to(self.unet.map_layer0.weight.dtype)
        network_input = F.pixel_unshuffle(network_input, patch) if patch > 1 else network_input
        value, bottleneck = self.unet(network_input, c.noise, self.label_rows(class_labels), augment_labels)
        value = value[:, :channels].float()
        value = F.pixel_shuffle(value, patch) if patch > 1 else value
        denoised = c.skip.view(-1, 1, 1, 1) * x + c.out.view(-1, 1, 1, 1) * value
        return EDMOutput(sample=denoised, bottleneck=bottleneck) if return_dict else (denoised, bottleneck)
