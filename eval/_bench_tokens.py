"""Token systems against the released order of computation: writing codes one by one, and both kinds of tokenizers."""

import copy
from typing import Any, Literal

import torch
from _timing import growth, in_own_process, machine, report, timed
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from genkit.convert import simvq, vim, vit_vqgan
from genkit.generators.vim import VIMTransformer2DModel
from genkit.pipelines.token_draws import inverse_cdf
from genkit.pipelines.tokenizers import load_tokenizer
from genkit.pipelines.vim import CodeWriter
from genkit.tokenizers import conv_vqgan
from genkit.tokenizers import vit_vqgan as vit
from genkit.tokenizers.conv_vqgan import ConvVQModel
from genkit.tokenizers.vit_vqgan import ViTVQModel


class ConcatenatingGPT:
    """The released sampler's order: four projections, a stack of all caches joined anew at every code, logits kept and joined.

    The token before is remembered here, which the released sampler forgets, so that both ways write the same codes.

    Args:
        state: official state dict.
        heads, depth: of the network.
    """

    def __init__(self, state: dict[str, Tensor], heads: int, depth: int) -> None:
        self.state, self.heads, self.depth = state, heads, depth

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    @torch.no_grad()
    def __call__(self, conds: Tensor, uniforms: Tensor) -> Tensor:
        """Return codes [b, T] of labels [b, 1] and uniforms [b, T]."""
        s, total = self.state, uniforms.shape[1]
        x = s["tok_emb_cond.weight"][conds] + s["pos_emb_cond"]
        past: list[Tensor] = []
        before: list[Tensor] = [torch.zeros_like(x) for _ in range(self.depth)]
        codes, kept = conds[:, :0], None
        for t in range(total):
            whole = torch.cat(past, dim=-2) if past else None
            presents = []
            for i in range(self.depth):
                name = f"blocks.{i}"
                normed = self.norm(x, f"{name}.ln1")
                mix = s[f"{name}.attn.time_mix"]
                shifted, before[i] = normed * mix + before[i] * (1 - mix), normed
                k, q, v = (
                    self.linear(shifted, f"{name}.attn.{part}").unflatten(-1, (self.heads, -1)).transpose(1, 2)
                    for part in ("key", "query", "value")
                )
                presents.append(torch.stack((k, v)))
                if whole is not None:
                    k, v = torch.cat((whole[i, 0], k), dim=-2), torch.cat((whole[i, 1], v), dim=-2)
                weights = (q @ (k * k.shape[-1] ** -0.5).transpose(-2, -1)).softmax(-1)
                x = x + self.linear((weights @ v).transpose(1, 2).flatten(2), f"{name}.attn.proj")
                inner = F.relu(self.linear(self.norm(x, f"{name}.ln2"), f"{name}.mlp.p0")).square()
                x = x + self.linear(inner, f"{name}.mlp.p1")
            past.append(torch.stack(presents))
            logits = F.linear(self.norm(x, "layer_norm"), s["head.weight"])[:, -1]
            kept = logits if kept is None else torch.cat([kept, logits], dim=1)
            codes = torch.cat([codes, inverse_cdf(logits, uniforms[:, t])[:, None]], dim=1)
            if t + 1 < total:
                x = s["tok_emb_code.weight"][codes[:, -1:]] + s["pos_emb_code"][:, t : t + 1]
        return codes


def stage2(
    side: int = 32, codes: int = 8192, width: int = 512, depth: int = 8, heads: int = 8, batch: int = 1, device: str = "cpu",
    threads: int = 0, repeats: int = 1,
) -> None:  # fmt: skip
    """Time writing the codes of a picture one after the other.

    Args:
        side: of the grid of codes.
        codes: size of the codebook.
        width, depth, heads: of the generator.
        batch: pictures at once.
        device: cpu, cuda or mps.
        threads: CPU threads; 0 leaves PyTorch's choice.
        repeats: timed runs of each way.
    """
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = VIMTransformer2DModel(sample_size=side, codebook_size=codes, hidden_size=width, depth=depth, num_heads=heads).eval()
    model = model.requires_grad_(False).to(device)
    plain = ConcatenatingGPT({key: value.clone() for key, value in vim.to_official(model).items()}, heads, depth)
    conds, uniforms = torch.zeros(batch, 1, dtype=torch.long, device=device), torch.rand(batch, side * side).to(device)

    def ours() -> Tensor:
        writer, found = CodeWriter(model, conds), conds[:, :0]
        for t in range(side * side):
            found = torch.cat([found, inverse_cdf(writer.logits(found), uniforms[:, t])[:, None]], dim=1)
        return found

    print(f"{depth} blocks x {width}, {side * side} codes of {codes}, batch {batch}, float32; {machine(device)}")
    report(timed({"released order": lambda: plain(conds, uniforms), "genkit": ours}, repeats, device), batch * side * side, "codes")


class PlainTower:
    """ViT-VQGAN's encoder as released: one product for q, k and v, attention by products and a softmax.

    Args:
        state: official state dict.
        depth, heads: of the encoder.
    """

    def __init__(self, state: dict[str, Tensor], depth: int, heads: int) -> None:
        self.state, self.depth, self.heads = state, depth, heads

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Return latents [b, n, c] of pictures [b, 3, h, w] in [0, 1]."""
        s = self.state
        weight = s["encoder.to_patch_embedding.0.weight"]
        x = F.conv2d(x, weight, s["encoder.to_patch_embedding.0.bias"], stride=weight.shape[2:])
        x = rearrange(x, "b c h w -> b (h w) c") + s["encoder.en_pos_embedding"]
        width = x.shape[-1:]
        for i in range(self.depth):
            name = f"encoder.transformer.layers.{i}"
            normed = F.layer_norm(x, width, s[f"{name}.0.norm.weight"], s[f"{name}.0.norm.bias"])
            q, k, v = (
                rearrange(part, "b n (h d) -> b h n d", h=self.heads)
                for part in F.linear(normed, s[f"{name}.0.fn.to_qkv.weight"]).chunk(3, -1)
            )
            mixed = ((q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5).softmax(-1) @ v
            mixed = rearrange(mixed, "b h n d -> b n (h d)")
            x = F.linear(mixed, s[f"{name}.0.fn.to_out.weight"], s[f"{name}.0.fn.to_out.bias"]) + x
            normed = F.layer_norm(x, width, s[f"{name}.1.norm.weight"], s[f"{name}.1.norm.bias"])
            inner = F.linear(normed, s[f"{name}.1.fn.net.0.weight"], s[f"{name}.1.fn.net.0.bias"]).tanh()
            x = F.linear(inner, s[f"{name}.1.fn.net.2.weight"], s[f"{name}.1.fn.net.2.bias"]) + x
        x = F.layer_norm(x, width, s["encoder.transformer.norm.weight"], s["encoder.transformer.norm.bias"])
        return F.linear(x, s["pre_quant.weight"], s["pre_quant.bias"])


def vit_tokenizer(
    size: Literal["small", "base"] = "base", side: int = 256, batch: int = 1, device: str = "cpu",
    dtype: Literal["float32", "bfloat16"] = "float32", threads: int = 0, repeats: int = 3,
) -> None:  # fmt: skip
    """Time ViT-VQGAN's encoder at a published size.

    Args:
        size: published size.
        side: of the pictures in pixels.
        batch: pictures at once.
        device: cpu, cuda or mps.
        dtype: of our weights; the plain way keeps fp32.
        threads: CPU threads; 0 leaves PyTorch's choice.
        repeats: timed runs of each way.
    """
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    options = vit.SIZES[size]
    codes = {"name": "l2_vq", "codebook_size": 8192, "dim": 32}
    model = ViTVQModel(8, **options, quantizer_config=codes, official_range=True, sample_size=side).eval().requires_grad_(False)
    tower = options["encoder_config"]
    plain = PlainTower({key: value.to(device) for key, value in vit_vqgan.to_official(model).items()}, tower["depth"], tower["heads"])
    model = model.to(device, getattr(torch, dtype))
    x = torch.rand(batch, 3, side, side).to(device)
    ways = {
        "released order, fp32": lambda: plain(x),
        f"genkit, {dtype}": torch.no_grad()(lambda: model.encode_latents((2 * x - 1).to(model.dtype)).float()),
    }
    print(f"ViT-VQGAN {size} encoder, {batch} x {side}x{side}; {machine(device)}")
    report(timed(ways, repeats, device), batch, "pictures")


class PlainConv:
    """SimVQ's convolutional towers as released, in the usual order of memory."""

    def __init__(self, state: dict[str, Tensor], levels: int, blocks: int) -> None:
        self.state, self.levels, self.blocks = state, levels, blocks

    def conv(self, x: Tensor, name: str, **options: Any) -> Tensor:
        return F.conv2d(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"), **options)

    def swish(self, x: Tensor, name: str) -> Tensor:
        x = F.group_norm(x, conv_vqgan.GROUPS, self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-6)
        return x * torch.sigmoid(x)

    def block(self, x: Tensor, name: str) -> Tensor:
        branch = self.conv(self.swish(x, f"{name}.norm1"), f"{name}.conv1", padding=1)
        branch = self.conv(self.swish(branch, f"{name}.norm2"), f"{name}.conv2", padding=1)
        shortcut = f"{name}.nin_shortcut"
        return branch + (self.conv(x, shortcut) if f"{shortcut}.weight" in self.state else x)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Return latents [b, c, h, w]."""
        x = self.conv(x, "encoder.conv_in", padding=1)
        for i in range(self.levels):
            for j in range(self.blocks):
                x = self.block(x, f"encoder.down.{i}.block.{j}")
            if i + 1 < self.levels:
                x = self.conv(x, f"encoder.down.{i}.downsample", stride=2, padding=1)
        for j in range(self.blocks):
            x = self.block(x, f"encoder.mid_block.{j}")
        return self.conv(self.swish(x, "encoder.norm_out"), "encoder.conv_out")

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Return pictures."""
        x = self.conv(x, "decoder.conv_in", padding=1)
        for j in range(self.blocks):
            x = self.block(x, f"decoder.mid_block.{j}")
        for i in reversed(range(self.levels)):
            for j in range(self.blocks):
                x = self.block(x, f"decoder.up.{i}.block.{j}")
            if i:
                x = self.conv(x, f"decoder.up.{i}.upsample.conv1", padding=1)
                x = rearrange(x, "b (p q c) h w -> b c (h p) (w q)", p=2, q=2)
        return self.conv(self.swish(x, "decoder.norm_out"), "decoder.conv_out", padding=1)


def conv_tokenizer(
    part: Literal["encode", "decode"] = "decode", side: int = 128, batch: int = 1, device: str = "cpu", compiled: bool = False,
    threads: int = 0, repeats: int = 3,
) -> None:  # fmt: skip
    """Time SimVQ's image tokenizer at its published size, in fp32 and bf16.

    Args:
        part: encode or decode.
        side: of the pictures in pixels.
        batch: pictures at once.
        device: cpu, cuda or mps.
        compiled: also time bf16 with torch.compile.
        threads: CPU threads; 0 leaves PyTorch's choice.
        repeats: timed runs of each way.
    """
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    sizes = conv_vqgan.SIZES["simvq"]
    model = ConvVQModel(quantizer_config={"name": "simvq", "codebook_size": 1024, "dim": 128}, **sizes).to(device)
    model = model.eval().requires_grad_(False)
    plain = PlainConv(simvq.to_official(model), len(sizes["multipliers"]), 2)
    half = copy.deepcopy(model).to(torch.bfloat16, memory_format=torch.channels_last)
    h = side // model.patch[0]
    x = torch.rand(batch, 3, side, side).to(device) * 2 - 1 if part == "encode" else torch.randn(batch, 128, h, h).to(device)

    def ours(own: ConvVQModel) -> Tensor:
        like = own.decoder.conv_in.weight
        if part == "encode":
            return rearrange(own.encode_latents(x.to(like)), "b (h w) c -> b c h w", h=h).float()
        return own.decode_latents(rearrange(x.to(like), "b c h w -> b (h w) c"), (h, h)).float()

    ways = {"released order, fp32": lambda: plain.encode(x) if part == "encode" else plain.decode(x)}
    ways |= {"genkit, fp32": torch.no_grad()(lambda: ours(model)), "genkit, bf16": torch.no_grad()(lambda: ours(half))}
    if compiled:
        fast = copy.deepcopy(half)
        fast.encoder.compile()
        fast.decoder.compile()
        ways["genkit, bf16, compiled"] = torch.no_grad()(lambda: ours(fast))
    print(f"SimVQ's tokenizer, {part}, {batch} x {side}x{side}; {machine(device)}")
    report(timed(ways, repeats, device), batch, "pictures")


def tiles(model: str = "genkit/enat-lowpoly", sides: tuple[int, ...] = (256, 512, 1024), threads: int = 0, repeats: int = 3) -> None:
    """Time a tokenizer there and back on large pictures, whole and in tiles, and measure by what the process grows at most (Linux).

    Args:
        model: packaged name, folder or hub id.
        sides: of the pictures in pixels.
        threads: CPU threads; 0 leaves PyTorch's choice.
        repeats: timed runs of each way.
    """
    if threads:
        torch.set_num_threads(threads)
    print(f"{model}, there and back, tiles of {load_tokenizer(model).config['sample_size']} pixels; {machine('cpu')}")
    for side in sides:
        ways = {f"{side}x{side}, {name}": _there_and_back(model, side, is_tiled) for name, is_tiled in (("whole", False), ("tiles", True))}
        report(timed(ways, repeats, "cpu"), 1, "pictures")
        peaks = [in_own_process("_bench_tokens", f"tile_peak({model!r}, {side}, {t}, {torch.get_num_threads()})") for t in (False, True)]
        print(f"  grows by {peaks[0]:,.0f} MB whole, {peaks[1]:,.0f} MB in tiles")


def _there_and_back(model: str, side: int, is_tiled: bool):  # type: ignore[no-untyped-def]
    """Return what encodes and decodes a picture."""
    tokenizer, x = load_tokenizer(model), torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1

    @torch.no_grad()
    def run() -> Tensor:
        if is_tiled:
            return tokenizer.tiled_decode(tokenizer.tiled_encode(x).indices).sample
        return tokenizer(x).sample

    return run


def tile_peak(model: str, side: int, is_tiled: bool, threads: int) -> float:
    """Return the MB by which this process grows at most, its kernels being loaded by a small run before."""
    torch.set_num_threads(threads)
    _there_and_back(model, 64, is_tiled)()
    return growth(_there_and_back(model, side, is_tiled))
