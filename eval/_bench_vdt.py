"""The video transformer against its composition as published: fused qkv, folds by copies, two maps behind temporal attention."""

import copy
from typing import Literal

import torch
from _timing import machine, report, timed
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from genkit.blocks.fast_linear import is_worthwhile, with_fast_linear
from genkit.convert.vdt import to_official
from genkit.generators.vdt import SIZES, VDTTransformer3DModel


class PlainVDT:
    """VDT as its figure reads, on the official tensors.

    Args:
        state: official state dict.
        heads: of both attentions.
        depth: blocks.
        patch: side of a patch.
    """

    def __init__(self, state: dict[str, Tensor], heads: int, depth: int, patch: int) -> None:
        self.state, self.heads, self.depth, self.patch = state, heads, depth, patch

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def attention(self, x: Tensor, name: str) -> Tensor:
        q, k, v = rearrange(self.linear(x, f"{name}.qkv"), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        return self.linear(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"), f"{name}.proj")

    @torch.no_grad()
    def __call__(self, x: Tensor, timestep: Tensor) -> Tensor:
        b, f = x.shape[:2]
        s, width = self.state, self.state["pos_embed"].shape[-1]
        tokens = F.conv2d(x.flatten(0, 1), s["x_embedder.proj.weight"], s["x_embedder.proj.bias"], stride=self.patch)
        side = tokens.shape[-1]
        x = tokens.flatten(2).transpose(1, 2) + s["pos_embed"]
        x = rearrange(rearrange(x, "(b f) n d -> (b n) f d", b=b) + s["time_embed"], "(b n) f d -> (b f) n d", b=b)
        angles = timestep.float()[:, None] * torch.exp(-torch.arange(128) * torch.log(torch.tensor(10000.0)) / 128).to(timestep.device)
        hidden = F.silu(self.linear(torch.cat([angles.cos(), angles.sin()], -1), "t_embedder.mlp.0"))
        cond = F.silu(self.linear(hidden, "t_embedder.mlp.2") + s["y_embedder.embedding_table.weight"][0])

        def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
            x = rearrange(F.layer_norm(x, (width,), eps=1e-6), "(b f) n d -> b (f n) d", b=b)
            return rearrange(x * (1 + scale[:, None]) + shift[:, None], "b (f n) d -> (b f) n d", f=f)

        def gated(x: Tensor, gate: Tensor) -> Tensor:
            return rearrange(rearrange(x, "(b f) n d -> b (f n) d", b=b) * gate[:, None], "b (f n) d -> (b f) n d", f=f)

        for i in range(self.depth):
            name = f"blocks.{i}"
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.linear(cond, f"{name}.adaLN_modulation.1").chunk(6, dim=1)
            frames = rearrange(x, "(b f) n d -> (b n) f d", b=b)
            normed = F.layer_norm(frames, (width,), s[f"{name}.temporal_norm1.weight"], s[f"{name}.temporal_norm1.bias"])
            mixed = self.linear(self.attention(normed, f"{name}.temporal_attn"), f"{name}.temporal_fc")
            x = x + rearrange(mixed, "(b n) f d -> (b f) n d", b=b)
            x = x + gated(self.attention(modulated(x, shift_a, scale_a), f"{name}.attn"), gate_a)
            inner = F.gelu(self.linear(modulated(x, shift_m, scale_m), f"{name}.mlp.fc1"), approximate="tanh")
            x = x + gated(self.linear(inner, f"{name}.mlp.fc2"), gate_m)
        shift, scale = self.linear(cond, "final_layer.adaLN_modulation.1").chunk(2, dim=1)
        out = self.linear(modulated(x, shift, scale), "final_layer.linear")
        return rearrange(out, "(b f) (h w) (p q c) -> b f c (h p) (w q)", b=b, h=side, p=self.patch, q=self.patch)


def vdt(
    size: str = "vdt_s_2",
    frames: int = 16,
    side: int = 32,
    batch: int = 1,
    device: str = "cpu",
    dtype: Literal["float32", "bfloat16"] = "float32",
    compiled: bool = False,
    threads: int = 0,
    repeats: int = 3,
) -> None:
    """Time one evaluation of the video transformer.

    Args:
        size: published size, key of `genkit.generators.vdt.SIZES`.
        frames: of a clip.
        side: of a latent frame.
        batch: clips at once.
        device: cpu, cuda or mps.
        dtype: of our weights; the plain way keeps fp32.
        compiled: also time our way with torch.compile.
        threads: CPU threads; 0 leaves PyTorch's choice.
        repeats: timed runs of each way.
    """
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    options = SIZES[size]
    model = VDTTransformer3DModel(sample_size=side, num_frames=frames, **options).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    plain = PlainVDT(
        {k: v.to(device) for k, v in to_official(model).items()}, options["num_heads"], options["depth"], options["patch_size"]
    )
    model = model.to(device, getattr(torch, dtype))
    model.merge_temporal()
    x, t = torch.randn(batch, frames, 4, side, side).to(device), torch.full((batch,), 500, device=device)
    ways = {"plain, fp32": lambda: plain(x, t)}
    if device == "cpu" and is_worthwhile():
        ways["plain, fp32, oneDNN"] = torch.no_grad()(with_fast_linear(lambda: plain(x, t)))  # what the faster library alone brings
    ways[f"genkit, {dtype}"] = torch.no_grad()(lambda: model(x.to(model.dtype), t).sample.float())
    if compiled:
        fast = copy.deepcopy(model)
        fast.compile_repeated_blocks()
        ways[f"genkit, {dtype}, compiled"] = torch.no_grad()(lambda: fast(x.to(model.dtype), t).sample.float())
    print(f"{size}, {batch} x {frames} frames of {side}x{side} latents; {machine(device)}")
    report(timed(ways, repeats, device), batch, "clips")
