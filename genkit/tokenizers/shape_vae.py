"""ShapeVAE: a surface's points to a set of latent tokens and back to a field that says where the surface is.

Hunyuan3D 2.0 (Tencent 2025, arXiv 2501.12202) after 3DShape2VecSet (Zhang et al. 2023, arXiv 2301.11445); FlashVDM (Lai et al. 2025, arXiv
2503.16302) for the slim head. Computes the numbers of the official base, mini, turbo and with-encoder files (`genkit.convert.flashvdm`).

- any surface of uniform and sharp-edge points; latent tokens are queries by farthest points
- the head turns any point of space into a logit, positive inside; keys and values of the tokens are computed once per shape
- logits saturate near 1: the field is a signed distance, truncated

Legend: b shapes, p points, n latent tokens, d width, e width of a latent, k wave numbers, m kept points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from genkit.blocks.attend import attend
from genkit.blocks.attention import Attention, AttentionConfig
from genkit.blocks.branch import Block, Branch
from genkit.blocks.caps import Caps
from genkit.blocks.fast_linear import with_fast_linear
from genkit.blocks.mlp import MLPConfig
from genkit.blocks.norms import build_norm
from genkit.blocks.stack import build as build_stack
from genkit.checks import check_shape
from genkit.tokenizers.point_sampling import farthest_points

SIZES: dict[str, dict[str, Any]] = {
    "hunyuan3d_v2_0": {"num_latents": 3072, "scale_factor": 0.9990943042622529, "pc_size": 30720, "pc_sharpedge_size": 30720},
    "hunyuan3d_v2_mini": {"num_latents": 512, "scale_factor": 1.0188137142395404, "pc_size": 5120, "pc_sharpedge_size": 5120},
}
"""Published sizes; the turbo files differ in the head."""
LOG_VARIANCES = (-30.0, 20.0)


def fourier_features(x: Tensor, num_freqs: int, include_pi: bool = False) -> Tensor:
    """Return [x, sin(x f), cos(x f)], f = 1, 2, 4, ... (times pi), coordinate by coordinate: [..., 3 + 6 k] of points [..., 3]."""
    frequencies = 2.0 ** torch.arange(num_freqs, device=x.device, dtype=torch.float32) * (math.pi if include_pi else 1.0)
    angles = (x.float()[..., None] * frequencies).flatten(-2)
    return torch.cat([x.float(), angles.sin(), angles.cos()], dim=-1)


@dataclass
class VecsetPosterior:
    """A normal distribution over latent tokens.

    Args:
        mean: [b, n, e].
        log_variance: [b, n, e], within `LOG_VARIANCES`.
    """

    mean: Tensor
    log_variance: Tensor

    @property
    def std(self) -> Tensor:
        """Standard deviations [b, n, e]."""
        return (0.5 * self.log_variance).exp()

    def sample(self, noise: Tensor) -> Tensor:
        """Return mean + std * noise for standard normal noise [b, n, e]."""
        return self.mean + self.std * noise

    def kl(self) -> Tensor:
        """Return the divergence from the standard normal, the mean over tokens and channels [b], in nats."""
        return 0.5 * (self.mean.square() + self.log_variance.exp() - 1 - self.log_variance).flatten(1).mean(1)


def self_block(dim: int, heads: int, qkv_bias: bool, qk_norm: bool, eps: float = 1e-6) -> Block:
    """Return a block of self-attention and MLP."""
    attention = AttentionConfig(heads=heads, qkv_bias=qkv_bias, qk_norm="ln" if qk_norm else "none")
    return Block([Branch(attention.build(dim), dim, "ln", eps=eps), Branch(MLPConfig().build(dim), dim, "ln", eps=eps)], dim)


def cross_block(dim: int, heads: int, qkv_bias: bool, qk_norm: bool, context_dim: int, ratio: float = 4, eps: float = 1e-6) -> Block:
    """Return a block of cross-attention to normed tokens, and MLP."""
    attention = AttentionConfig(heads=heads, qkv_bias=qkv_bias, qk_norm="ln" if qk_norm else "none", keys="context")
    first = Branch(attention.build(dim, context_dim=context_dim), dim, "ln", eps=eps, context_norm="ln", context_dim=context_dim)
    return Block([first, Branch(MLPConfig(ratio=ratio).build(dim), dim, "ln", eps=eps)], dim)


class GeometryHead(nn.Module):
    """The query head: one cross-attention from points to tokens, one MLP, one number.

    Args:
        width: d of the tokens.
        heads: attention heads of the VAE.
        point_width: width of embedded points.
        downsample: r; the head is d / r wide and has heads / r heads.
        mlp_ratio: hidden width of its MLP as a multiple of its width.
        ln_post: a norm before the last layer; without it queries and keys are not normed either.
        qkv_bias, qk_norm: as the VAE's.

    Raises:
        ValueError: if r does not divide width and heads.
    """

    def __init__(
        self, width: int, heads: int, point_width: int, downsample: int, mlp_ratio: float, ln_post: bool, qkv_bias: bool, qk_norm: bool
    ) -> None:
        super().__init__()
        if width % downsample or heads % downsample:
            raise ValueError(f"GeometryHead: downsample={downsample} must divide width={width} and heads={heads}.")
        dim = width // downsample
        self.query_proj = nn.Linear(point_width, dim)
        self.latents_proj = nn.Linear(width, dim) if downsample != 1 else nn.Identity()
        self.block = cross_block(dim, heads // downsample, qkv_bias, qk_norm and ln_post, dim, mlp_ratio)
        self.ln_post = build_norm("ln" if ln_post else "none", dim, eps=1e-5)
        self.out = nn.Linear(dim, 1)

    @property
    def attention(self) -> Attention:
        """The cross-attention."""
        return cast(Attention, cast(Branch, self.block.branches[0]).f)

    def keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [b, heads, n, hd] of tokens [b, n, d], once per shape."""
        return cast(Branch, self.block.branches[0]).project_context(self.latents_proj(tokens))

    def queries(self, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """Return the head's start [b, p, d'] and its queries [b, heads, p, hd] of embedded points [b, p, 3 + 6 k]."""
        x = self.query_proj(embedded)
        normed = cast(Branch, self.block.branches[0]).norm(x)
        q = self.attention.q(normed).unflatten(-1, (self.attention.heads, -1)).transpose(1, 2)
        return x, self.attention.q_norm(q)

    def finish(self, x: Tensor, heads: Tensor) -> Tensor:
        """Return logits [b, p] of the start [b, p, d'] and what was attended to [b, heads, p, hd]."""
        x = x + self.attention.proj(heads.transpose(1, 2).flatten(2))
        x = cast(Branch, self.block.branches[1])(x)
        return self.out(self.ln_post(x)).squeeze(-1)

    def forward(self, embedded: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return logits [b, p] of embedded points, attending to all tokens."""
        x, q = self.queries(embedded)
        return self.finish(x, attend(q, keys, values, scale=self.attention.scale))


class ShapeVAE(ModelMixin, ConfigMixin):
    """Surface points to latent tokens to a field.

    Args:
        num_latents: n.
        embed_dim: e.
        width: d.
        heads: attention heads.
        num_encoder_layers: self-attention blocks of the encoder; None leaves the encoder out, as decoder-only files do.
        num_decoder_layers: blocks of the decoder.
        num_freqs, include_pi: of the Fourier features.
        point_feats: numbers of a surface point beside its position: normal, and 1 on sharp edges.
        pc_size, pc_sharpedge_size: uniform and sharp-edge points of a surface.
        downsample_ratio: the encoder attends to so many points per latent token.
        encoder_ln_post: a norm behind the encoder.
        qkv_bias, qk_norm: of all attentions.
        head_downsample, head_mlp_ratio, head_ln_post: see `GeometryHead`; 2, 1, False is the slim head.
        scale_factor: generators see latents times this.
        stack: stack string of `num_decoder_layers` blocks for the decoder in place of the published ones; mixers must be set operations.

    Raises:
        ValueError: if sizes do not fit together, or a stack has another number of blocks or mixers that need an order.

    Example:
        >>> vae = ShapeVAE(num_latents=4, embed_dim=2, width=8, heads=2, num_decoder_layers=1).eval()
        >>> vae.query(torch.zeros(1, 5, 3), vae.decode(torch.zeros(1, 4, 2))).shape
        torch.Size([1, 5])
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["Block"]
    _repeated_blocks: ClassVar[list[str]] = ["Block"]

    @register_to_config
    def __init__(
        self,
        *,  # diffusers forgets values passed by position when a model is rebuilt from its config
        num_latents: int = 512,
        embed_dim: int = 64,
        width: int = 1024,
        heads: int = 16,
        num_encoder_layers: int | None = None,
        num_decoder_layers: int = 16,
        num_freqs: int = 8,
        include_pi: bool = False,
        point_feats: int = 4,
        pc_size: int = 5120,
        pc_sharpedge_size: int = 5120,
        downsample_ratio: int = 20,
        encoder_ln_post: bool = True,
        qkv_bias: bool = False,
        qk_norm: bool = True,
        head_downsample: int = 1,
        head_mlp_ratio: float = 4.0,
        head_ln_post: bool = True,
        scale_factor: float = 1.0,
        stack: str | None = None,
    ) -> None:
        super().__init__()
        points, share = pc_size + pc_sharpedge_size, pc_size * num_latents
        if width % heads or points < 1 or (num_encoder_layers is not None and share % points):
            raise ValueError(
                "ShapeVAE: heads must divide width, and pc_size / (pc_size + pc_sharpedge_size) * num_latents be whole, got "
                f"heads={heads}, width={width}, pc_size={pc_size}, pc_sharpedge_size={pc_sharpedge_size}, num_latents={num_latents}."
            )
        point_width = 3 + 6 * num_freqs
        self.encoder: SurfaceEncoder | None
        self.pre_kl: nn.Linear | None
        self.encoder, self.pre_kl = None, None
        if num_encoder_layers is not None:
            blocks = [self_block(width, heads, qkv_bias, qk_norm) for _ in range(num_encoder_layers)]
            cross = cross_block(width, heads, qkv_bias, qk_norm, width)
            self.encoder = SurfaceEncoder(point_width + point_feats, width, cross, blocks, encoder_ln_post)
            self.pre_kl = nn.Linear(width, 2 * embed_dim)
        self.post_kl = nn.Linear(embed_dim, width)
        if stack is None:
            self.blocks = nn.ModuleList(self_block(width, heads, qkv_bias, qk_norm) for _ in range(num_decoder_layers))
        else:
            self.blocks = build_stack(stack, width, heads=heads, norm="ln", eps=1e-6, needs=Caps(set_op=True))
        if len(self.blocks) != num_decoder_layers:
            raise ValueError(f"ShapeVAE: num_decoder_layers={num_decoder_layers}, got {len(self.blocks)} blocks in {stack!r}.")
        self.head = GeometryHead(width, heads, point_width, head_downsample, head_mlp_ratio, head_ln_post, qkv_bias, qk_norm)
        self.gradient_checkpointing = False
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """PyTorch's start values; the last map of every branch a quarter of that, so that deep stacks start near the identity."""
        for module in self.modules():
            if isinstance(module, Branch):
                last: Any = getattr(module.f, "proj", None) or getattr(module.f, "fc2", None)
                if isinstance(last, nn.Linear):
                    last.weight.mul_(0.25)

    @property
    def counts(self) -> tuple[int, int]:
        """Latent tokens from uniform and from sharp-edge points."""
        c = self.config
        uniform = c["pc_size"] * c["num_latents"] // (c["pc_size"] + c["pc_sharpedge_size"])
        return uniform, c["num_latents"] - uniform

    def embed(self, points: Tensor) -> Tensor:
        """Return Fourier features [..., 3 + 6 k] of points [..., 3], fp32."""
        return fourier_features(points, self.config["num_freqs"], self.config["include_pi"])

    def choose_points(
        self, surface: Tensor, permutations: tuple[Tensor, Tensor] | None = None, starts: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the points [b, m, 3 + feats] that the encoder attends to, and those [b, n, 3 + feats] that latent tokens start from.

        Args:
            surface: [b, p, 3 + feats], uniform points, then sharp-edge points.
            permutations: of each kind's points, the same for all shapes; the first ones are kept. In order if None.
            starts: [b] for each kind: where farthest-point sampling starts among the kept; at the first if None.

        Raises:
            ValueError: for another number of points.
        """
        c = self.config
        sizes = {"p": c["pc_size"] + c["pc_sharpedge_size"], "d": 3 + c["point_feats"]}
        check_shape(surface, "ShapeVAE: surface", "b p d", **sizes)
        kept, chosen = [], []
        for i, part in enumerate(surface.split([c["pc_size"], c["pc_sharpedge_size"]], dim=1)):
            count = self.counts[i]
            if not count:
                continue
            part = part if permutations is None else part[:, permutations[i]]
            part = part[:, : count * c["downsample_ratio"]]
            start = torch.zeros(len(part), dtype=torch.long, device=part.device) if starts is None else starts[i]
            index = farthest_points(part[..., :3], count, start)
            kept.append(part)
            chosen.append(part.gather(1, index[..., None].expand(-1, -1, part.shape[-1])))
        return torch.cat(kept, dim=1), torch.cat(chosen, dim=1)

    @with_fast_linear
    def encode(
        self, surface: Tensor, permutations: tuple[Tensor, Tensor] | None = None, starts: tuple[Tensor, Tensor] | None = None
    ) -> VecsetPosterior:
        """Return the posterior over latent tokens of surfaces [b, p, 3 + feats]; arguments as in `choose_points`.

        Raises:
            ValueError: if the model has no encoder, or the surface another number of points.
        """
        if self.encoder is None or self.pre_kl is None:
            raise ValueError("ShapeVAE.encode: this model is a decoder only; open a file with an encoder.")
        data, queries = self.choose_points(surface, permutations, starts)
        embedded = [torch.cat([self.embed(x[..., :3]), x[..., 3:].float()], dim=-1).to(self.pre_kl.weight.dtype) for x in (queries, data)]
        mean, log_variance = self.pre_kl(self.encoder(*embedded)).chunk(2, dim=-1)
        return VecsetPosterior(mean, log_variance.clamp(*LOG_VARIANCES))

    @with_fast_linear
    def decode(self, latents: Tensor) -> Tensor:
        """Return tokens [b, n, d] for `query` of latents [b, n, e]; any n."""
        check_shape(latents, "ShapeVAE: latents", "b n e", e=self.config["embed_dim"])
        x = self.post_kl(latents)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x)
            else:
                x = block(x)
        return x

    @with_fast_linear
    def query(self, points: Tensor, tokens: Tensor) -> Tensor:
        """Return logits [b, p], positive inside, at points [b, p, 3] of shapes with tokens [b, n, d] from `decode`."""
        check_shape(points, "ShapeVAE: points", "b p d", b=len(tokens), d=3)
        return self.head(self.embed(points).to(tokens.dtype), *self.head.keys_values(tokens))

    def forward(self, surface: Tensor, points: Tensor, noise: Tensor | None = None) -> tuple[Tensor, VecsetPosterior]:
        """Return logits [b, p'] at points and the posterior, through a sample where noise [b, n, e] is given, else through the mean."""
        posterior = self.encode(surface)
        latents = posterior.mean if noise is None else posterior.sample(noise)
        return self.query(points, self.decode(latents)), posterior


class SurfaceEncoder(nn.Module):
    """Chosen points attend to all kept ones, then to each other.

    Args:
        point_width: width of an embedded point with its features.
        width: d.
        cross: the first block.
        blocks: the others.
        ln_post: a norm behind them.
    """

    def __init__(self, point_width: int, width: int, cross: Block, blocks: list[Block], ln_post: bool) -> None:
        super().__init__()
        self.input_proj = nn.Linear(point_width, width)
        self.cross, self.blocks = cross, nn.ModuleList(blocks)
        self.ln_post = build_norm("ln" if ln_post else "none", width, eps=1e-5)

    def forward(self, queries: Tensor, data: Tensor) -> Tensor:
        """Return [b, n, d] of embedded points [b, n, ...] and [b, m, ...]."""
        x = self.cross(self.input_proj(queries), context=self.input_proj(data))
        for block in self.blocks:
            x = block(x)
        return self.ln_post(x)
