"""ENAT's token loop, the code search and attention, each against the plain order of computation."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from _timing import machine, report, timed
from torch import Tensor

from genkit.blocks.attend import attend as attend_heads
from genkit.blocks.attention import Attention
from genkit.blocks.branch import Block, Branch
from genkit.blocks.fast_linear import is_worthwhile, with_fast_linear
from genkit.blocks.modulation import modulate
from genkit.generators.enat import ENATTransformer2DModel
from genkit.pipelines.enat import ENATPipeline
from genkit.pipelines.seeds import SampleStreams, gumbel
from genkit.schedulers.masked_token import MaskedTokenScheduler, draw_tokens
from genkit.tokenizers.quantizers.search import nearest_codes
from genkit.tokenizers.vit_vqgan import ViTVQModel


def plain_block(block: Block, x: Tensor, context: Tensor, vector: Tensor) -> Tensor:
    """Evaluate a block as its equations read: modulation anew, explicit softmax matrix, the context projected by the block itself.

    Args:
        block: ENAT block.
        x: [b, n, d] tokens.
        context: [b, p, d], p may be 0.
        vector: [b, d].
    """
    attention, mlp = (cast(Branch, branch) for branch in block.branches)
    mixer, (b, n, _) = cast(Attention, attention.f), x.shape
    assert block.modulation is not None
    assert mixer.context_kv is not None
    assert mixer.kv is not None
    vectors = block.modulation(vector).unbind(1)
    own = modulate(attention.norm(x), vectors[0], vectors[1])
    other = modulate(attention.context_norm(context), vectors[2], vectors[3])
    q = mixer.q(own).view(b, n, mixer.heads, -1).transpose(1, 2)
    kv = torch.cat([mixer.context_kv(other), mixer.kv(own)], dim=1)
    k, v = kv.view(b, kv.shape[1], 2, mixer.heads, -1).permute(2, 0, 3, 1, 4)
    weights = (q * mixer.scale @ k.transpose(-2, -1)).softmax(-1)
    x = x + vectors[4][:, None] * mixer.proj((weights @ v).transpose(1, 2).flatten(2))
    return x + vectors[7][:, None] * mlp.f(modulate(mlp.norm(x), vectors[5], vectors[6]))


def plain_forward(
    model: ENATTransformer2DModel, ids: Tensor, labels: Tensor, state: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Evaluate the network with boolean masks and logits at all positions.

    Returns:
        Logits [b, n, K]; features [b, n, d] and masks [b, n] for the next step.
    """
    b, d = len(ids), model.config["hidden_size"]
    embedded, vector = model.embedding(ids), model.class_embedding(labels)
    is_masked = ids == model.mask_token_id
    is_old = torch.zeros_like(is_masked) if state is None else ~state[1]
    is_new = ~is_masked & ~is_old
    old = embedded.new_zeros(b, 0, d) if state is None else model.reuse(state[0][is_old].view(b, -1, d))
    new, masked = embedded[is_new].view(b, -1, d), embedded[is_masked].view(b, -1, d)
    split = model.config["num_encoder_layers"]
    blocks = [cast(Block, block) for block in model.blocks]
    if new.shape[1]:
        for block in blocks[:split]:
            new = plain_block(block, new, old, vector)
    visible = torch.cat([old, new], dim=1)
    for block in blocks[split:]:
        masked = plain_block(block, masked, visible, vector)
    feat = torch.zeros_like(embedded, dtype=masked.dtype)
    for part, where in ((old, is_old), (new, is_new), (masked, is_masked)):
        feat[where] = part.flatten(0, 1).to(feat.dtype)
    return model.head(model.norm(feat), model.embedding.word.weight), (feat, is_masked)


def plain_sample(
    model: ENATTransformer2DModel,
    scheduler: MaskedTokenScheduler,
    labels: Tensor,
    guidance_scale: float,
    seeds: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """Sample as the equations read: both branches one after the other at every step, everything at all positions.

    Under a half dtype the weights stay fp32 and autocast converts them at each use, as in the published sampling.
    """
    b, device, streams = len(labels), labels.device, SampleStreams(seeds)
    ids = torch.full((b, model.num_tokens), model.mask_token_id, device=device)
    null = torch.full_like(labels, model.null_class)
    cond_state: tuple[Tensor, Tensor] | None = None
    null_state: tuple[Tensor, Tensor] | None = None
    for s, count in enumerate(scheduler.masked_counts(model.num_tokens)):
        uniforms = streams.uniform(2, model.num_tokens).to(device)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            cond, cond_state = plain_forward(model, ids, labels, cond_state)
            uncond, null_state = plain_forward(model, ids, null, null_state)
        cond, uncond = cond.float(), uncond.float()
        log_probs = (cond + (scheduler.guidance_at(s, guidance_scale) - 1) * (cond - uncond)).log_softmax(-1)
        tokens = draw_tokens(log_probs, scheduler.token_temperature_at(s), uniforms=uniforms[:, 0])
        confidence = log_probs.gather(-1, tokens[..., None]).squeeze(-1) + scheduler.mask_temperature_at(s) * gumbel(uniforms[:, 1])
        is_masked = ids == model.mask_token_id
        confidence = confidence.masked_fill(~is_masked, torch.inf)
        left = confidence.argsort(dim=1, stable=True)[:, :count]
        ids = torch.where(is_masked, tokens, ids).scatter(1, left, model.mask_token_id)
    return ids


def random_model(device: str, **sizes: Any) -> ENATTransformer2DModel:
    """Return a generator whose blocks all act (a new one starts as the identity)."""
    torch.manual_seed(0)
    model = ENATTransformer2DModel(**sizes).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if ".modulation." in name:
            parameter.normal_(std=0.02)
    return model.to(device)


def enat(
    hidden_size: int = 768,
    num_heads: int = 12,
    num_encoder_layers: int = 14,
    num_decoder_layers: int = 2,
    side: int = 16,
    codebook_size: int = 1024,
    steps: int = 8,
    guidance_scale: float = 3.5,
    batch_size: int = 1,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str = "cpu",
    threads: int = 0,
    repeats: int = 3,
    compiled: bool = False,
) -> None:
    """Time the token loop of ENATPipeline (no decoding) against the plain order of computation.

    Args:
        hidden_size: width of the network.
        num_heads: attention heads.
        num_encoder_layers: blocks for visible tokens.
        num_decoder_layers: blocks for masked tokens.
        side: side of the token grid.
        codebook_size: codes.
        steps: sampling steps.
        guidance_scale: 1 = off.
        batch_size: pictures at once, each of its own class.
        dtype: of our weights; the plain way keeps fp32 weights under autocast, as published.
        device: cpu, cuda or mps.
        threads: CPU threads; 0 leaves PyTorch's choice.
        repeats: timed runs of each way.
        compiled: also time our way with torch.compile on the blocks.
    """
    if threads:
        torch.set_num_threads(threads)
    sizes = {"hidden_size": hidden_size, "num_heads": num_heads, "num_encoder_layers": num_encoder_layers}
    sizes |= {"num_decoder_layers": num_decoder_layers, "sample_size": side, "codebook_size": codebook_size}
    model, ours = random_model(device, **sizes), random_model(device, **sizes).to(getattr(torch, dtype))
    tower = {"dim": 16, "depth": 1, "heads": 1, "mlp_dim": 16, "dim_head": 16}
    vqvae = ViTVQModel(4, tower, tower, {"name": "simvq", "codebook_size": codebook_size, "dim": 4}).to(device)  # not used: no decoding
    scheduler = MaskedTokenScheduler(mask_token_id=codebook_size)
    scheduler.set_timesteps(steps)
    labels, seeds = list(range(batch_size)), list(range(100, 100 + batch_size))

    def fast() -> Tensor:
        pipe = ENATPipeline(ours, vqvae, scheduler)
        states = pipe.iterate(labels, num_inference_steps=steps, guidance_scale=guidance_scale, generator=seeds)
        return list(states)[-1].sample

    def plain(dtype: str) -> Tensor:
        with torch.no_grad():
            return plain_sample(model, scheduler, torch.tensor(labels, device=device), guidance_scale, seeds, getattr(torch, dtype))

    print(machine(device))
    blocks = f"{num_encoder_layers}+{num_decoder_layers} blocks x {hidden_size}"
    print(f"ENAT {blocks}, {side * side} tokens, {steps} steps, guidance {guidance_scale:g}, batch {batch_size}, {dtype}, {device}")
    ways: dict[str, Callable[[], Tensor]] = {"plain order": partial(plain, dtype), "genkit": fast}
    if dtype != "float32":
        ways["plain order, float32"] = partial(plain, "float32")
    elif device == "cpu" and is_worthwhile():
        ways["plain order, oneDNN"] = torch.no_grad()(with_fast_linear(partial(plain, "float32")))  # what the faster library alone brings
    timings = timed(ways, repeats, device)
    if compiled:
        ours.compile_repeated_blocks(fullgraph=True, dynamic=True)
        timings |= timed({"genkit, compiled": fast}, repeats, device)
    report(timings, batch_size, "pictures")
    if dtype == "float32" and not torch.equal(cast(Tensor, timings["genkit"].result), cast(Tensor, timings["plain order"].result)):
        raise SystemExit("The two ways gave different tokens in float32: the comparison does not hold.")


def search(codes: int = 262_144, tokens: int = 4096, dim: int = 128, device: str = "cpu", threads: int = 0, repeats: int = 3) -> None:
    """Time the chunked nearest-code search against the full distance matrix |z|^2 + |q|^2 - 2 z.q, in fp32.

    The full matrix is made for as many tokens at a time as fit 1 GB, so that the comparison runs on a small machine too; as published it
    takes all tokens at once.

    Args:
        codes: size of the codebook.
        tokens: latents to quantize.
        dim: width of both.
        device: cpu, cuda or mps.
        threads: CPU threads; 0 leaves PyTorch's choice.
        repeats: timed runs of each way.
    """
    if threads:
        torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    book = torch.randn(codes, dim, generator=generator).to(device)
    latents = torch.randn(tokens, dim, generator=generator).to(device)
    rows = max(1, 10**9 // (4 * codes))

    def full() -> Tensor:
        norms = book.square().sum(1)
        parts = [(z.square().sum(1, keepdim=True) + norms - 2 * (z @ book.T)).argmin(1) for z in latents.split(rows)]
        return torch.cat(parts)

    print(machine(device))
    matrix = f"full matrix {4e-9 * codes * tokens:.1f} GB, {rows} rows at a time"
    print(f"nearest of {codes} codes x {dim} for {tokens} tokens, float32, {device}; {matrix}")
    report(timed({"full matrix": full, "genkit": lambda: nearest_codes(latents, book)}, repeats, device), tokens, "tokens")


def attend(
    batch: int = 16,
    heads: int = 2,
    queries: int = 256,
    keys: int = 256,
    width: int = 64,
    backward: bool = True,
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
    device: str = "cpu",
    threads: int = 0,
    repeats: int = 7,
) -> None:
    """Time attention: PyTorch's fused kernel, the softmax written out, and `genkit.blocks.attend`, which chooses one of them.

    Args:
        batch: b.
        heads: attention heads.
        queries: nq.
        keys: nk.
        width: of a head.
        backward: with gradients, as in training.
        dtype: of the inputs.
        device: cpu, cuda or mps.
        threads: CPU threads; 0 leaves PyTorch's choice.
        repeats: timed runs of each way.
    """
    if threads:
        torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, n, width) for n in (queries, keys, keys)]
    q, k, v = (torch.randn(shape, generator=generator).to(device, getattr(torch, dtype)).requires_grad_(backward) for shape in shapes)

    def run(way: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        with torch.set_grad_enabled(backward):
            out = way(q, k, v)
        if backward:
            torch.autograd.grad(out.sum(), (q, k, v))
        return out.detach()

    def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q * width**-0.5) @ k.transpose(-2, -1)).softmax(-1) @ v

    print(machine(device))
    print(f"attention {batch} x {heads} heads x {queries} x {keys}, width {width}, {dtype}, {device}{', with backward' * backward}")
    ways = {"fused": F.scaled_dot_product_attention, "written out": written_out, "genkit": attend_heads}
    timings = timed({name: partial(run, way) for name, way in ways.items()}, repeats, device)
    report(timings, batch, "sequences")
