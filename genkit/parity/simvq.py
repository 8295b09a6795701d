"""Runners of the SimVQ golden cases that concern the quantizer."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from genkit.convert import simvq
from genkit.parity.base import Case
from genkit.tokenizers.quantizers import SimVQ
from genkit.tokenizers.quantizers.search import half_norms
from genkit.tokenizers.quantizers.stats import CodebookStats


def quantizer(case: Case) -> dict[str, Tensor]:
    """Kind simvq/quantizer: 2-D and 1-D latents, both conventions of beta, gradients, lookup and statistics."""
    z, grad_out, beta = case.inputs["z"], case.inputs["grad_out"], case.config["beta"]
    results: dict[str, Tensor] = {}
    for variant, legacy, flat in (("fixed", False, False), ("legacy", True, False), ("seq1d", False, True)):
        model = _build(case, beta=beta, legacy=legacy).train()
        shape = (z.flatten(2), grad_out.flatten(2)) if flat else (z, grad_out)
        results |= {f"{variant}.{name}": value for name, value in _step(model, *shape).items()}
    model = _build(case, beta=beta)
    indices = results["fixed.codes"].view(z.shape[0], *z.shape[2:])
    with torch.no_grad():
        codebook = model.codebook()
        entry = rearrange(model.lookup(indices), "b h w d -> b d h w")
        raw = rearrange(model.embedding(indices), "b h w d -> b d h w")  # what the official helper returns: rows before the projection
    stats = CodebookStats(model.codebook_size)
    stats.update(indices)
    health = {key: torch.tensor(value, dtype=torch.float32) for key, value in stats.compute().items()}
    return results | {
        "codes_bhw": indices,
        "codebook_projected": codebook,
        "correct_entry": entry,
        "official_get_codebook_entry_RAW": raw,
        "code_gap": _gap(rearrange(z, "b d h w -> (b h w) d"), codebook),
        "utilisation": health["utilisation"],
        "perplexity": health["perplexity"],
    }


def codebook(case: Case) -> dict[str, Tensor]:
    """Kind simvq/codebook: search in an official-size codebook; weights and latents by formula."""
    config = case.config
    k, d = config["n_e"], config["e_dim"]

    def draw(key: str, shape: list[int], scale: float) -> Tensor:
        generator = np.random.Generator(np.random.PCG64(zlib.crc32((key + config.get("suffix", "")).encode())))
        return (torch.from_numpy(generator.standard_normal(shape, dtype=np.float32)) * scale).to(case.device, case.dtype)

    state = {
        "embedding.weight": draw("embedding.weight", [k, d], d**-0.5),
        "embedding_proj.weight": draw("embedding_proj.weight", [d, d], d**-0.5),
        "embedding_proj.bias": draw("embedding_proj.bias", [d], 0.05),
    }
    model, _ = simvq.from_official(state, beta=config["beta"], legacy=config["legacy"])
    z = draw("z", config["z_shape"], config["z_scale"])
    with torch.no_grad():
        out = model.to(case.device)(rearrange(z, "b d ... -> b ... d"))
        gap = _gap(rearrange(z, "b d ... -> (b ...) d"), model.codebook())
    return {"codes": out.indices.flatten(), "zq": rearrange(out.quantized, "b ... d -> b d ..."), "commit": out.loss, "code_gap": gap}


def _build(case: Case, **options: Any) -> SimVQ:
    """Build the quantizer through the converter, trainable."""
    model, _ = simvq.from_official(case.weights(), **options)
    model.embedding_proj.requires_grad_(True)
    return model.to(case.device, case.dtype)


def _step(model: SimVQ, z: Tensor, grad_out: Tensor) -> dict[str, Tensor]:
    """Quantize z [b, d, ...] and back-propagate sum(zq * grad_out) + loss."""
    z = z.clone().requires_grad_(True)
    out = model(rearrange(z, "b d ... -> b ... d"))
    zq = rearrange(out.quantized, "b ... d -> b d ...")
    ((zq * grad_out).sum() + out.loss).backward()
    proj = model.embedding_proj
    gradients = {"grad_z": z.grad, "grad_proj_weight": proj.weight.grad, "grad_proj_bias": proj.bias.grad}
    return {"zq": zq, "codes": out.indices.flatten(), "commit": out.loss, **{k: v for k, v in gradients.items() if v is not None}}


def _gap(latents: Tensor, codes: Tensor) -> Tensor:
    """Return second-best minus best squared distance [n] of latents [n, d] to codes [k, d]: four candidates in fp32, then fp64."""
    half, gaps = half_norms(codes), []
    for z in latents.split(64):
        candidates = torch.addmm(-half, z, codes.T).topk(4, dim=1).indices
        distance = (z[:, None].double() - codes[candidates].double()).square().sum(-1).sort(dim=1).values
        gaps.append(distance[:, 1] - distance[:, 0])
    return torch.cat(gaps).float()
