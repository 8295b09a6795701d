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
from genkit.tokenizers.quantizers import FSQ, LFQ, EMAVectorQuantizer, ResidualQuantizer, SimVQ
from genkit.tokenizers.quantizers.gradient import rotation_trick
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


# ---- the second public implementation, and other quantizers ----

COMMITMENT_WEIGHTS = {"frozen_dim": (0.7, 0.5)}  # of the whole loss, and of its input side, where they are not 1 and 0.25


def _alternative(state: dict[str, Tensor], gradient: str, beta: float) -> SimVQ:
    """Build the second implementation's SimVQ: a frozen codebook and a transform without bias, or two layers."""
    names = {"code_transform.": "embedding_proj.", "frozen_codebook": "embedding.weight"}
    ours = {}
    for key, value in state.items():
        official = next(name for name in names if key.startswith(name))
        ours[names[official] + key.removeprefix(official)] = value
    table = ours["embedding.weight"]
    hidden = ours["embedding_proj.0.weight"].shape[0] if "embedding_proj.0.weight" in ours else None
    dim = ours["embedding_proj.2.weight" if hidden else "embedding_proj.weight"].shape[0]
    has_bias = any(key.endswith("bias") for key in ours)
    model = SimVQ(len(table), dim, frozen_dim=table.shape[1], bias=has_bias, hidden=hidden, gradient=gradient, beta=beta)
    model.load_state_dict(ours)
    return model.train()


def quantizer_alt(case: Case) -> dict[str, Tensor]:
    """Kind simvq/quantizer_alt: SimVQ without bias, with other frozen widths, with two layers, residual; the rotation trick."""
    state, inputs = case.weights(), case.inputs
    results: dict[str, Tensor] = {}
    for name in sorted({key.split(".")[0] for key in state}):
        own = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
        gradient = "straight_through" if name in ("ste", "residual") else "rotation"
        weight, beta = COMMITMENT_WEIGHTS.get(name, (1.0, 0.25))
        x, grad_out = inputs["x"].clone().requires_grad_(True), inputs["grad_out"]
        if any(key.startswith("layers.") for key in own):
            parts = [
                {key.removeprefix(f"layers.{i}."): v for key, v in own.items() if key.startswith(f"layers.{i}.")}
                for i in range(case.config["num_quantizers"])
            ]
            levels = [_alternative(part, gradient, beta) for part in parts]
            remaining = iter(levels)
            model: Any = ResidualQuantizer(remaining.__next__, num_levels=len(levels), is_shared=False).train()
            out = model(x)
            losses = [beta * out.terms[f"commitment_{i}"] + out.terms[f"codebook_{i}"] for i in range(len(levels))]
            loss = torch.stack(losses)
            modules = {f"layers.{i}.": level for i, level in enumerate(levels)}
        else:
            model = _alternative(own, gradient, beta)
            out = model(x)
            loss, modules = weight * out.loss, {"": model}
        ((out.quantized * grad_out).sum() + loss.sum()).backward()
        found = {"zq": out.quantized.detach(), "codes": out.indices, "loss": loss.detach(), "grad_x": x.grad}
        if name.endswith("_cf"):  # channel first, a trailing axis
            found |= {key: found[key].transpose(1, 2)[..., None] for key in ("zq", "grad_x")} | {"codes": found["codes"][..., None]}
        for prefix, module in modules.items():
            for key, parameter in module.embedding_proj.named_parameters():
                found[f"grad.{prefix}code_transform.{key}"] = parameter.grad
        results |= {f"{name}.{key}": value for key, value in found.items()}
    e = inputs["rot.e"].clone().requires_grad_(True)
    turned = rotation_trick(e, inputs["rot.q"])
    (turned * inputs["rot.grad_out"]).sum().backward()
    assert e.grad is not None
    return results | {"rot.out": turned.detach(), "rot.grad_e": e.grad}


def quantizer_family(case: Case) -> dict[str, Tensor]:
    """Kind simvq/quantizer_family: finite scalar and lookup-free quantization, codes that follow their latents."""
    config, inputs = case.config, case.inputs
    fsq, z = FSQ(config["levels"]), inputs["fsq_z"].clone().requires_grad_(True)
    out = fsq(z)
    (out.quantized * inputs["fsq_grad_out"]).sum().backward()
    results = {"fsq.codes": out.quantized, "fsq.indices": out.indices.int(), "fsq.grad_z": z.grad}
    results |= {"fsq.roundtrip": fsq.lookup(out.indices), "fsq.implicit_codebook_first64": fsq.lookup(torch.arange(64))}
    lfq, x = LFQ(config["lfq_bits"], inverse_temperature=10.0).train(), inputs["lfq_x"].clone().requires_grad_(True)
    signs = lfq(x)
    ((signs.quantized * inputs["lfq_grad_out"]).sum() + signs.loss).backward()
    terms = {"per_sample_entropy": "entropy", "batch_entropy": "diversity", "commitment": "commitment"}
    results |= {f"lfq.{name}": signs.terms[own] for name, own in terms.items()}
    results |= {"lfq.codes": signs.quantized, "lfq.indices": signs.indices, "lfq.aux_loss": signs.loss, "lfq.grad_x": x.grad}
    return {name: value.detach() for name, value in (results | _running_means(case)).items() if value is not None}


def _running_means(case: Case) -> dict[str, Any]:
    """Return one training step of the codes that follow their latents."""
    config, state = case.config, case.weights()
    model = EMAVectorQuantizer(config["K"], config["dim"], decay=config["ema_decay"]).train()
    model.embedding.copy_(state["embed"])
    model.counts.copy_(state["cluster_size"])
    model.sums.copy_(state["embed"] * state["cluster_size"][:, None])
    x = case.inputs["ema_x"].clone().requires_grad_(True)
    out = model(x)
    (out.quantized.square().sum() + out.loss).backward()
    found = {"quantized": out.quantized, "indices": out.indices, "commit": out.loss, "grad_x": x.grad}
    found |= {"after.embed": model.embedding, "after.cluster_size": model.counts, "after.embed_avg": model.sums}
    return {f"ema.{name}": value for name, value in found.items()}
