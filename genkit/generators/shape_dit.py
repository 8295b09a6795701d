"""ShapeDiT: a flow-matching transformer over the latent tokens of a shape, given the tokens of a picture or text.

Hunyuan3D 2.0 (Tencent 2025, arXiv 2501.12202); blocks of two streams and of one after FLUX, without positions. Computes the numbers of the
official base, mini, multi-view, fast and turbo files (`genkit.convert.shape_dit`).

- tokens are sets: permuting latent tokens permutes the result, permuting condition tokens changes nothing
- time runs from 0 (noise) to 1 (data); the result is the velocity towards the data
- `modulations` computes what depends on time and guidance alone, for all steps of a sampler at once
- equal condition tokens stay equal through all blocks, so n of them are one token that counts n times (`context_count`): the unconditional
  branch of guidance costs what the latent tokens cost

Legend: b shapes, n latent tokens, c channels of one, m condition tokens, d width, k vectors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.blocks.attend import attend
from genkit.blocks.embeddings import TimestepMLP
from genkit.blocks.fast_linear import with_fast_linear
from genkit.blocks.mlp import MLPConfig
from genkit.blocks.modulation import Modulation, modulate
from genkit.blocks.norms import build_norm
from genkit.checks import check_shape

SIZES: dict[str, dict[str, int]] = {
    "hunyuan3d_dit_v2_0": {"depth": 16, "depth_single": 32},
    "hunyuan3d_dit_v2_mini": {"depth": 8, "depth_single": 16},
}
"""Published sizes; the multi-view, fast and turbo files have those of the first or second."""

Heads = tuple[Tensor, Tensor, Tensor]


@dataclass
class ShapeDiTOutput(BaseOutput):
    """What the transformer returns.

    Attributes:
        sample: [b, n, c] velocity.
    """

    sample: Tensor


class Stream(nn.Module):
    """One stream's part of a two-stream block: its norms, projections and MLP.

    Args:
        dim: d.
        heads: attention heads.
        mlp_ratio: hidden width as a multiple of d.
        qkv_bias: of the fused projection.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float, qkv_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = Modulation(dim, 6)
        self.norm1, self.norm2 = build_norm("ln_noaffine", dim, 1e-6), build_norm("ln_noaffine", dim, 1e-6)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = build_norm("rms", dim // heads, 1e-6), build_norm("rms", dim // heads, 1e-6)
        self.mlp = MLPConfig(ratio=mlp_ratio, act="gelu_tanh").build(dim)

    def project(self, x: Tensor, vectors: Tensor) -> Heads:
        """Return queries, keys and values [b, heads, n, hd] of tokens [b, n, d]."""
        q, k, v = split_heads(self.qkv(modulate(self.norm1(x), vectors[:, 0], vectors[:, 1])), self.heads)
        return self.q_norm(q), self.k_norm(k), v

    def finish(self, x: Tensor, attended: Tensor, vectors: Tensor) -> Tensor:
        """Return tokens [b, n, d] after what they attended to [b, n, d], and the MLP."""
        x = x + vectors[:, None, 2] * self.proj(attended)
        return x + vectors[:, None, 5] * self.mlp(modulate(self.norm2(x), vectors[:, 3], vectors[:, 4]))


class TwoStreamBlock(nn.Module):
    """Latent and condition tokens with weights of their own, in one attention.

    Args:
        dim, heads, mlp_ratio, qkv_bias: see `Stream`.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float, qkv_bias: bool) -> None:
        super().__init__()
        self.latent, self.context = (Stream(dim, heads, mlp_ratio, qkv_bias) for _ in range(2))

    def forward(self, x: Tensor, context: Tensor, vectors: tuple[Tensor, Tensor], bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return both streams after the block.

        Args:
            x: [b, n, d]. context: [b, m, d].
            vectors: modulations [b, 6, d] of latent and condition.
            bias: [b|1, 1, 1, m + n] of the logits, or None.
        """
        pairs = zip(self.context.project(context, vectors[1]), self.latent.project(x, vectors[0]), strict=True)
        q, k, v = (torch.cat(pair, dim=2) for pair in pairs)
        out = attend(q, k, v, bias=bias).transpose(1, 2).flatten(2)
        m = context.shape[1]
        return self.latent.finish(x, out[:, m:], vectors[0]), self.context.finish(context, out[:, :m], vectors[1])


class OneStreamBlock(nn.Module):
    """Attention and MLP side by side on all tokens.

    Args:
        dim, heads: d and attention heads.
        mlp_ratio: hidden width as a multiple of d.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.heads, self.hidden = heads, int(dim * mlp_ratio)
        self.modulation = Modulation(dim, 3)
        self.norm = build_norm("ln_noaffine", dim, 1e-6)
        self.fused_in, self.fused_out = nn.Linear(dim, 3 * dim + self.hidden), nn.Linear(dim + self.hidden, dim)
        self.q_norm, self.k_norm = build_norm("rms", dim // heads, 1e-6), build_norm("rms", dim // heads, 1e-6)

    def forward(self, x: Tensor, vectors: Tensor, bias: Tensor | None) -> Tensor:
        """Return tokens [b, m + n, d] after the block; vectors [b, 3, d], bias as in `TwoStreamBlock`."""
        fused = self.fused_in(modulate(self.norm(x), vectors[:, 0], vectors[:, 1]))
        qkv, hidden = fused.split([fused.shape[-1] - self.hidden, self.hidden], dim=-1)
        q, k, v = split_heads(qkv, self.heads)
        out = attend(self.q_norm(q), self.k_norm(k), v, bias=bias).transpose(1, 2).flatten(2)
        return x + vectors[:, None, 2] * self.fused_out(torch.cat([out, F.gelu(hidden, approximate="tanh")], dim=-1))


def split_heads(qkv: Tensor, heads: int) -> Heads:
    """Return q, k, v [b, heads, n, hd] of [b, n, (3 heads hd)]."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return q, k, v


class ShapeDiT(ModelMixin, ConfigMixin):
    """The velocity field of shapes.

    Args:
        in_channels: c.
        context_in_dim: width of a condition token.
        hidden_size: d.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLPs as a multiple of d.
        depth: blocks of two streams. depth_single: blocks of one.
        qkv_bias: of the two-stream projections.
        max_period: of the sinusoids of time and guidance; 1000 as released.
        guidance_embed: whether the guidance scale is an input, as after guidance distillation.

    Raises:
        ValueError: if the heads do not divide the width.

    Example:
        >>> model = ShapeDiT(in_channels=4, context_in_dim=6, hidden_size=16, num_heads=2, depth=1, depth_single=1)
        >>> model(torch.randn(2, 5, 4), torch.tensor([0.0, 0.5]), torch.randn(2, 3, 6)).sample.shape
        torch.Size([2, 5, 4])
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["TwoStreamBlock", "OneStreamBlock"]
    _repeated_blocks: ClassVar[list[str]] = ["TwoStreamBlock", "OneStreamBlock"]

    @register_to_config
    def __init__(
        self,
        *,  # diffusers forgets values passed by position when a model is rebuilt from its config
        in_channels: int = 64,
        context_in_dim: int = 1536,
        hidden_size: int = 1024,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        depth: int = 16,
        depth_single: int = 32,
        qkv_bias: bool = True,
        max_period: float = 1000.0,
        guidance_embed: bool = False,
    ) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"ShapeDiT: hidden_size must be a multiple of num_heads, got {hidden_size} and {num_heads}.")
        self.latent_in, self.context_in = nn.Linear(in_channels, hidden_size), nn.Linear(context_in_dim, hidden_size)
        self.time_in = TimestepMLP(hidden_size, max_period, 1000.0)
        self.guidance_in = TimestepMLP(hidden_size, max_period, 1000.0) if guidance_embed else None
        self.blocks = nn.ModuleList([TwoStreamBlock(hidden_size, num_heads, mlp_ratio, qkv_bias) for _ in range(depth)])
        self.single_blocks = nn.ModuleList([OneStreamBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth_single)])
        self.norm = build_norm("ln_noaffine", hidden_size, 1e-6)
        self.modulation = Modulation(hidden_size, 2)
        self.head = nn.Linear(hidden_size, in_channels)
        self.gradient_checkpointing = False
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set start values for training: Xavier-uniform Linears, biases, modulations, guidance and head zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Modulation):
                module.reset_parameters()
        for layer in (self.head, *([self.guidance_in.fc2] if self.guidance_in is not None else [])):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def modulations(self, timestep: Tensor, guidance: Tensor | None = None) -> list[Tensor]:
        """Return what depends on time and guidance alone: of every block in order (two-stream blocks latent, condition), then the head's.

        Args:
            timestep: [s] in [0, 1]: of a batch, or all steps of a sampler.
            guidance: [s] scales, for models with guidance embedding.

        Returns:
            Tensors [s, k, d].

        Raises:
            ValueError: for guidance to a model without, or none to a model with.
        """
        if (guidance is None) != (self.guidance_in is None):
            takes = "takes no guidance scale; leave it out" if guidance is not None else "takes a guidance scale; give guidance"
            raise ValueError(f"ShapeDiT: this model {takes}.")
        vector = self.time_in(timestep)
        if self.guidance_in is not None and guidance is not None:
            vector = vector + self.guidance_in(guidance)
        two = [cast(TwoStreamBlock, block) for block in self.blocks]
        layers = [layer for block in two for layer in (block.latent.modulation, block.context.modulation)]
        layers += [cast(OneStreamBlock, block).modulation for block in self.single_blocks]
        return [layer(vector) for layer in (*layers, self.modulation)]

    @with_fast_linear
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        guidance: Tensor | None = None,
        *,
        encoder_attention_mask: Tensor | None = None,
        context_count: int | None = None,
        modulations: list[Tensor] | None = None,
        return_dict: bool = True,
    ) -> ShapeDiTOutput | tuple[Tensor]:
        """Evaluate the velocity.

        Args:
            hidden_states: [b, n, c].
            timestep: [b] or one number in [0, 1], 1 = data.
            encoder_hidden_states: [b, m, context_in_dim].
            guidance: [b] scales, for models with guidance embedding.
            encoder_attention_mask: [b, m] bool, True = a real condition token; all if None.
            context_count: how many equal tokens the one condition token stands for; needs m = 1.
            modulations: from `modulations`, [b, k, d] or [1, k, d] each; timestep and guidance are not used then.
            return_dict: False returns a tuple.

        Raises:
            ValueError: if shapes or arguments do not fit.
        """
        config = self.config
        b, n = (check_shape(hidden_states, "ShapeDiT: hidden_states", "b n c", c=config["in_channels"])[key] for key in "bn")
        sizes = check_shape(encoder_hidden_states, "ShapeDiT: encoder_hidden_states", "b m w", b=b, w=config["context_in_dim"])
        bias = self._bias(context_count, sizes["m"], n, hidden_states)
        if encoder_attention_mask is not None:
            check_shape(encoder_attention_mask, "ShapeDiT: encoder_attention_mask", "b m", b=b, m=sizes["m"])
            hidden = F.pad(~encoder_attention_mask, (0, n)).view(b, 1, 1, -1)
            bias = (hidden_states.new_zeros(1, 1, 1, 1) if bias is None else bias).masked_fill(hidden, -math.inf)
        if modulations is None:
            modulations = self.modulations(torch.as_tensor(timestep, device=hidden_states.device).reshape(-1).expand(b), guidance)
        x, context = self.latent_in(hidden_states), self.context_in(encoder_hidden_states)
        vectors = iter(modulations)
        for block in self.blocks:
            x, context = self._run(block, x, context, (next(vectors), next(vectors)), bias)
        both = torch.cat([context, x], dim=1)
        for block in self.single_blocks:
            both = self._run(block, both, next(vectors), bias)
        shift, scale = next(vectors).unbind(1)
        out = self.head(modulate(self.norm(both[:, sizes["m"] :]), shift, scale))
        return ShapeDiTOutput(sample=out) if return_dict else (out,)

    def _bias(self, count: int | None, m: int, n: int, like: Tensor) -> Tensor | None:
        """Return ln(count) for the condition token, as a bias of the logits."""
        if count is None or count == 1:
            return None
        if m != 1 or count < 1:
            raise ValueError(f"ShapeDiT: context_count={count} is for one condition token that stands for several, got {m} tokens.")
        bias = like.new_zeros(1, 1, 1, 1 + n)
        bias[..., 0] = math.log(count)
        return bias

    def _run(self, block: nn.Module, *args: object) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, *args)
        return block(*args)
