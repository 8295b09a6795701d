"""VDT: a video diffusion transformer with temporal and spatial attention in every block, and one mask for all tasks.

VDT: General-purpose Video Diffusion Transformers via Mask Modeling (Lu et al., ICLR 2024, arXiv 2305.13311). Computes the numbers of the
official Sky Time-Lapse and Physion checkpoints (`genkit.convert`).

- attention over frames and over pixels (`axial`), never over both at once; folds are views, so nothing is copied around them
- what is given enters the input clean, what is to be made noisy (`genkit.data.video_masks`); the network is told neither
- the two linear maps behind temporal attention are one after `merge_temporal`, exactly
- other numbers of frames and other grids than trained: fixed tables are made anew
- text or classes (ours): a pooled text vector, or a class, joins the timestep's condition

Legend: b clips, f frames, c channels, h w rows and columns, n tokens of a frame, d width, p patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from einops import rearrange
from torch import Tensor, nn

from genkit.blocks.axial import AxialAttention, AxialConfig
from genkit.blocks.branch import Block, Branch
from genkit.blocks.embeddings import TimestepMLP, sincos_1d, sincos_2d
from genkit.blocks.fast_linear import with_fast_linear
from genkit.blocks.layout import Layout
from genkit.blocks.mlp import MLPConfig
from genkit.blocks.modulation import Modulation, modulate
from genkit.blocks.norms import build_norm
from genkit.blocks.stack import Stack, parse
from genkit.blocks.stack import build as build_stack
from genkit.checks import check_shape

SIZES: dict[str, dict[str, Any]] = {
    "vdt_s_2": {"hidden_size": 384, "depth": 12, "num_heads": 6, "patch_size": 2},
    "vdt_l_2": {"hidden_size": 1152, "depth": 28, "num_heads": 16, "patch_size": 2},
}
"""Published sizes; released checkpoints have num_classes=1."""


@dataclass
class VDTOutput(BaseOutput):
    """What the transformer returns.

    Attributes:
        sample: [b, f, c', h, w]: predicted noise, then variance logits where sigma is learned.
    """

    sample: Tensor


class VDTTransformer3DModel(ModelMixin, ConfigMixin):
    """VDT.

    Args:
        sample_size: side of a latent frame, or [h, w].
        patch_size: p.
        in_channels: c.
        hidden_size: d, a multiple of 4 and of the heads.
        depth: blocks.
        num_heads: of both attentions.
        mlp_ratio: hidden width of the block MLPs as a multiple of d.
        num_frames: trained length.
        num_classes: rows of the label table without the null row; published models have one label, number 0.
        class_dropout: probability with which `drop_labels` takes the null row; 0 leaves that row out.
        learn_sigma: also predict variance logits.
        temporal: False is the image model: one frame, no temporal attention.
        merged: temporal attention has one linear map behind it (see `merge_temporal`).
        text_dim: width of a pooled text vector, or None.
        stack: stack string of `depth` blocks in place of the published ones, "(axial('f') + axial('hw') + mlp) * depth"; every branch is
            then modulated.

    Raises:
        ValueError: if the sizes do not fit together.

    Example:
        >>> model = VDTTransformer3DModel(sample_size=4, hidden_size=16, depth=1, num_heads=2, num_frames=3)
        >>> model(torch.randn(2, 3, 4, 4, 4), torch.tensor([5, 9])).sample.shape
        torch.Size([2, 3, 8, 4, 4])
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["Block"]
    _repeated_blocks: ClassVar[list[str]] = ["Block"]

    @register_to_config
    def __init__(
        self,
        *,  # diffusers forgets values passed by position when a model is rebuilt from its config
        sample_size: int | Sequence[int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        num_frames: int = 16,
        num_classes: int = 1,
        class_dropout: float = 0.1,
        learn_sigma: bool = True,
        temporal: bool = True,
        merged: bool = False,
        text_dim: int | None = None,
        stack: str | None = None,
    ) -> None:
        super().__init__()
        size = (sample_size, sample_size) if isinstance(sample_size, int) else (int(sample_size[0]), int(sample_size[1]))
        if any(side % patch_size for side in size) or hidden_size % 4 or hidden_size % num_heads:
            raise ValueError(
                f"VDTTransformer3DModel: patch_size must divide sample_size, and hidden_size be a multiple of 4 and of num_heads, got "
                f"patch_size={patch_size}, sample_size={list(size)}, hidden_size={hidden_size}, num_heads={num_heads}."
            )
        if num_frames < 1 or (not temporal and num_frames != 1):
            raise ValueError(f"VDTTransformer3DModel: num_frames must be at least 1, and 1 without temporal=True, got {num_frames}.")
        self.grid = (size[0] // patch_size, size[1] // patch_size)
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.patch = nn.Conv2d(in_channels, hidden_size, patch_size, patch_size)
        self.register_buffer("pos_embed", sincos_2d(*self.grid, hidden_size)[None])
        self.register_buffer("time_embed", sincos_1d(num_frames, hidden_size)[None] if temporal else None)
        self.timestep = TimestepMLP(hidden_size)
        self.label = nn.Embedding(num_classes + (1 if class_dropout > 0 else 0), hidden_size)
        self.text = nn.Linear(text_dim, hidden_size) if text_dim is not None else None
        if stack is None:
            branches = partial_branches(hidden_size, num_heads, mlp_ratio, temporal, 1 if merged else 2)
            self.blocks = nn.ModuleList([Block(branches(), hidden_size, cond_dim=hidden_size) for _ in range(depth)])
        else:
            self.blocks = build_stack(stack, hidden_size, heads=num_heads, norm="ln_noaffine", eps=1e-6, modulated=True)
        if len(self.blocks) != depth:
            raise ValueError(f"VDTTransformer3DModel: depth={depth}, got {len(self.blocks)} blocks in {stack!r}.")
        self.norm = build_norm("ln_noaffine", hidden_size, 1e-6)
        self.modulation = Modulation(hidden_size, 2, hidden_size)
        self.head = nn.Linear(hidden_size, patch_size**2 * self.out_channels)
        self.gradient_checkpointing = False
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set the published start values: Xavier-uniform Linears, tables and timestep layers normal 0.02, modulation and head zero.

        The maps behind temporal attention are not zeroed: frames mix from the first step on.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for table in (self.label.weight, self.timestep.fc1.weight, self.timestep.fc2.weight):
            nn.init.normal_(table, std=0.02)
        for module in self.modules():
            if isinstance(module, Modulation):
                module.reset_parameters()
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def null_class(self) -> int:
        """Row of the label table that stands for no label.

        Raises:
            ValueError: if the model has none.
        """
        if not self.config["class_dropout"]:
            raise ValueError("VDTTransformer3DModel.null_class: this model has class_dropout=0 and no null row.")
        return int(self.config["num_classes"])

    def drop_labels(self, labels: Tensor, uniforms: Tensor) -> Tensor:
        """Replace labels [b] by the null row where uniforms [b] in [0, 1) fall below `class_dropout`."""
        return torch.where(uniforms < self.config["class_dropout"], self.null_class, labels)

    def merge_temporal(self) -> None:
        """Make the two linear maps behind each temporal attention one: the same numbers, a seventeenth of a block's work less."""
        for module in self.modules():
            if isinstance(module, AxialAttention):
                module.merge_out()
        self.register_to_config(merged=True)
        if self.config["stack"] is not None:
            merged = [
                tuple(replace(mixer, out_layers=1) if isinstance(mixer, AxialConfig) else mixer for mixer in block)
                for block in parse(self.config["stack"])
            ]
            self.register_to_config(stack=str(Stack(merged)))

    def condition(self, timestep: Tensor, class_labels: Tensor | None = None, pooled: Tensor | None = None) -> Tensor:
        """Return the condition [b, d] of timesteps [b], labels [b] (0 if None), and pooled text [b, text_dim] (zeros if None).

        Raises:
            ValueError: for text to a model without.
        """
        labels = torch.zeros_like(timestep, dtype=torch.long) if class_labels is None else class_labels
        found = self.timestep(timestep) + self.label(labels)
        if pooled is not None and self.text is None:
            raise ValueError("VDTTransformer3DModel: this model takes no text; leave pooled out.")
        if self.text is not None:
            rows = found.new_zeros(len(timestep), self.text.in_features) if pooled is None else pooled.to(found.dtype)
            found = found + self.text(rows)
        return found

    @with_fast_linear
    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        pooled: Tensor | None = None,
        return_dict: bool = True,
    ) -> VDTOutput | tuple[Tensor]:
        """Evaluate the network.

        Args:
            sample: [b, f, c, h, w] latents, clean where given and noisy where to be made. Any f for a temporal model, any grid of patches.
            timestep: [b] or one number, in the scheduler's steps.
            class_labels: [b] int64; 0 if None.
            pooled: [b, text_dim]; zeros if None.
            return_dict: False returns a tuple.

        Raises:
            ValueError: if shapes do not fit.
        """
        sizes = check_shape(sample, "VDTTransformer3DModel: sample", "b f c h w", c=self.config["in_channels"])
        b, f, p = sizes["b"], sizes["f"], self.config["patch_size"]
        if sizes["h"] % p or sizes["w"] % p or (not self.config["temporal"] and f != 1):
            raise ValueError(
                f"VDTTransformer3DModel: frames of whole {p}x{p} patches, and one frame for an image model, got {list(sample.shape)}."
            )
        steps = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(b)
        cond = self.condition(steps, class_labels, pooled)
        tokens = self.patch(sample.flatten(0, 1))
        grid = (f, tokens.shape[2], tokens.shape[3])
        x = self.positions(tokens.flatten(2).transpose(1, 2).unflatten(0, (b, f)), grid).flatten(1, 2)  # b (f n) d
        layout = Layout(grid=grid)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, cond, layout)
            else:
                x = block(x, cond, layout)
        shift, scale = self.modulation(cond).unbind(1)
        out = self.head(modulate(self.norm(x), shift, scale))
        out = rearrange(out, "b (f h w) (p q c) -> b f c (h p) (w q)", f=f, h=grid[1], w=grid[2], p=p, q=p)
        return VDTOutput(sample=out) if return_dict else (out,)

    def positions(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Add positions to tokens [b, f, n, d]: the tables of the checkpoint at the trained sizes, the formula elsewhere."""
        own = cast(Tensor, self.pos_embed)
        table = own if grid[1:] == self.grid else sincos_2d(grid[1], grid[2], x.shape[-1])[None].to(own)
        x = x + table.to(x.dtype)[:, None]
        if not self.config["temporal"]:
            return x
        times = cast(Tensor, self.time_embed)
        times = times if times.shape[1] == grid[0] else sincos_1d(grid[0], x.shape[-1])[None].to(times)
        return x + times.to(x.dtype)[:, :, None]


def partial_branches(dim: int, heads: int, mlp_ratio: float, temporal: bool, out_layers: int) -> Any:
    """Return a function that makes the branches of one block: frames (not modulated, not gated), pixels, MLP."""

    def make() -> list[Branch]:
        found = []
        if temporal:
            found.append(Branch(AxialConfig("f", out_layers=out_layers).build(dim, heads=heads), dim, "ln", eps=1e-5))
        modulated: dict[str, Any] = {"eps": 1e-6, "modulated": True}
        found.append(Branch(AxialConfig("hw").build(dim, heads=heads), dim, "ln_noaffine", **modulated))
        mlp = MLPConfig(hidden=int(dim * mlp_ratio), act="gelu_tanh").build(dim)
        return [*found, Branch(mlp, dim, "ln_noaffine", **modulated)]

    return make
