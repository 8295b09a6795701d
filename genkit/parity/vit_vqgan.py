"""Runners of the ViT-VQGAN golden cases."""

from __future__ import annotations

import zlib
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkit.blocks.branch import Block, Branch
from genkit.blocks.embeddings import sincos_2d
from genkit.convert import vim, vit_vqgan
from genkit.distill.adversarial import GAN_FORMS
from genkit.generators.vim import VIMTransformer2DModel
from genkit.parity import _tokenizer_losses as losses
from genkit.parity.base import Case, keep, with_gradients
from genkit.pipelines.token_draws import DrawRule, inverse_cdf
from genkit.pipelines.vim import CodeWriter
from genkit.tokenizers.discriminators import StyleDiscriminator, gradient_penalty
from genkit.tokenizers.quantizers import build_quantizer
from genkit.tokenizers.vit_vqgan import ViTVQModel


def stage1(case: Case) -> dict[str, Tensor]:
    """Kind vit_vqgan/stage1: the whole tokenizer with intermediates, losses and gradients.

    Cases store inputs and weights or give them by formula (official sizes); the same outputs are computed for both.
    """
    config = case.config
    size = config["image_size"]
    size = (size, size) if isinstance(size, int) else tuple(size)
    dim_head = [config[side].get("dim_head", 64) for side in ("encoder", "decoder")]
    quantizer = config["quantizer"]
    patch = _pair(config["patch_size"])
    tables = {
        f"{side}.{side[:2]}_pos_embedding": sincos_2d(size[0] // patch[0], size[1] // patch[1], config[side]["dim"])[None]
        for side in ("encoder", "decoder")
    }  # never a formula of their own
    state = tables | case.weights(
        shapes={k: s for k, s in _official_shapes(config, size, dim_head).items() if k not in tables}, rule=_formula
    )
    model, _ = vit_vqgan.from_official(
        state, dim_head=dim_head, beta=quantizer.get("beta", 0.25), use_norm=quantizer.get("use_norm", True), image_size=size
    )
    model = case.place_model(model)
    x = case.inputs["x"] if "x" in case.inputs else case.place(_formula_picture(size))
    return _results(model.requires_grad_(True), x)


def _results(model: ViTVQModel, x: Tensor) -> dict[str, Tensor]:
    """Run the tokenizer on pictures x [b, 3, H, W] in [0, 1]; return every tensor the kind knows."""
    results: dict[str, Tensor] = {}
    hooks = [module.register_forward_hook(keep(results, name)) for name, module in _watched(model).items()]
    out = model(x * 2 - 1)
    for hook in hooks:
        hook.remove()
    results["enc.patch_embed"] = results["enc.patch_embed"].flatten(2).transpose(1, 2)
    recon = (out.sample + 1) / 2
    with torch.no_grad():
        results["recon_from_codes"] = (model.decode(out.indices).sample + 1) / 2
    loss = F.mse_loss(recon, x) + out.loss
    model.zero_grad()
    loss.backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    official = vit_vqgan.TABLE.to_official(gradients)
    results |= {f"grad.{key}": value for key, value in official.items()}
    results |= {"recon": recon, "qloss": out.loss, "loss": loss, "quant_st": out.quantized}
    return results | {"codes": out.indices.flatten(1), "code_gap": _code_gap(model, out.latents.detach())}


def _watched(model: ViTVQModel) -> dict[str, nn.Module]:
    """Return the modules whose outputs the cases store, by stored name."""
    watched: dict[str, nn.Module] = {"enc.patch_embed": model.encoder.stem, "pre_quant": model.pre_quant, "post_quant": model.post_quant}
    for side, tower in (("enc", model.encoder), ("dec", model.decoder)):
        watched[f"{side}.final_norm"] = tower.norm
        for i, block in enumerate(tower.blocks):
            for name, branch in zip(("attn", "mlp"), cast(Block, block).branches, strict=True):
                watched[f"{side}.block{i}.{name}_branch"] = cast(Branch, branch).f
    return watched


def _code_gap(model: ViTVQModel, latents: Tensor) -> Tensor:
    """Return second-best minus best squared distance [b, n] of latents [b, n, c]."""
    z, codes = model.quantizer.prepare(latents.float()), model.quantizer.codebook().detach()
    nearest = torch.cdist(z, codes[None], compute_mode="donot_use_mm_for_euclid_dist").square().topk(2, dim=-1, largest=False).values
    return nearest[..., 1] - nearest[..., 0]


def _pair(value: int | list[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _official_shapes(config: dict, size: tuple[int, int], dim_head: list[int]) -> dict[str, tuple[int, ...]]:
    """Return official keys and shapes of a config, for cases whose weights are a formula."""
    quantizer = config["quantizer"]
    towers = [
        {**{k: config[side][k] for k in ("dim", "depth", "heads", "mlp_dim")}, "dim_head": width, "act": "tanh"}
        for side, width in zip(("encoder", "decoder"), dim_head, strict=True)
    ]
    with torch.device("meta"):
        model = ViTVQModel(
            list(_pair(config["patch_size"])), *towers,
            {"name": "l2_vq", "codebook_size": quantizer["n_embed"], "dim": quantizer["embed_dim"]}, sample_size=list(size),
        )  # fmt: skip
    return {key: tuple(value.shape) for key, value in vit_vqgan.to_official(model).items()}


def _formula(key: str, r: Tensor) -> Tensor:
    """Scale a standard normal draw as the official-size cases state."""
    if "norm" in key and key.endswith("weight"):
        return 1 + 0.1 * r
    if key == "quantizer.embedding.weight":
        return r
    if "bias" in key:
        return 0.05 * r
    return (0.3 if key == "encoder.to_patch_embedding.0.weight" else 0.03) * r


def _formula_picture(size: tuple[int, int]) -> Tensor:
    """Return the picture [1, 3, H, W] in [0, 1] that the official-size cases state."""

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).random(shape, dtype=np.float32)

    low = draw("x_low", (1, 3, size[0] // 8, size[1] // 8)).repeat(8, axis=2).repeat(8, axis=3)
    return torch.from_numpy(0.7 * low + 0.3 * draw("x", (1, 3, *size)))


def quantizers(case: Case) -> dict[str, Tensor]:
    """Kind vit_vqgan/quantizers: plain, normalised, residual and Gumbel codes with gradients; the forms of adversarial losses."""
    config, inputs = case.config, case.inputs
    sizes = {"codebook_size": config["n_embed"], "dim": config["embed_dim"], "beta": config["beta"]}
    residual = {"num_levels": config["num_quantizers"], "path": "vit_vqgan"}
    gumbel = {"name": "gumbel", "codebook_size": config["n_embed"], "dim": config["embed_dim"], "temperature": config["temp"]}
    variants: dict[str, dict[str, Any]] = {
        "vq_norm": {"name": "l2_vq", **sizes},
        "vq_nonorm": {"name": "vq", **sizes},
        "vq_residual": {"name": "l2_vq", **sizes, **residual},
        "vq_residual_nonorm": {"name": "vq", **sizes, **residual},
        "gumbel_train": gumbel,
        "gumbel_eval": gumbel,
    }
    results: dict[str, Tensor] = {}
    for name, options in variants.items():
        model: Any = build_quantizer(options).train(name != "gumbel_eval")
        table = (model.layers[0] if "num_levels" in options else model).embedding
        table.weight.data.copy_(case.weights()["embedding.weight"])
        z = inputs["z"].clone().requires_grad_(True)
        out = model(z, inputs["gumbel_noise"]) if name.startswith("gumbel") else model(z)
        ((out.quantized * inputs["grad_out"]).sum() + out.loss).backward()
        found = {"zq": out.quantized, "loss": out.loss, "codes": out.indices, "grad_z": z.grad, "grad_codebook": table.weight.grad}
        results |= {f"{name}.{key}": value for key, value in found.items() if value is not None}
    real, fake = inputs["logits_real"], inputs["logits_fake"]
    for name, (generator, discriminator) in GAN_FORMS.items():
        results |= {f"gan.{name}.g": generator(fake), f"gan.{name}.d": 0.5 * discriminator(real, fake)}
    return results


# ---- stage 2 ----


def stage2(case: Case) -> dict[str, Tensor]:
    """Kind vit_vqgan/stage2: teacher forcing with intermediates and gradients; sampling, exact and as the released sampler does."""
    config, inputs, state = case.config, case.inputs, case.weights()
    net, _ = vim.from_official(state, num_heads=config["n_heads"])
    net = case.place_model(net).requires_grad_(True)
    codes, conds, m = inputs["codes"], inputs["conds"], config["cond_num_tokens"]
    results: dict[str, Tensor] = {}
    hooks = [block.register_forward_hook(keep(results, f"block{i}")) for i, block in enumerate(net.blocks)]
    logits = net(codes, conds).logits[:, : codes.shape[1]]
    for hook in hooks:
        hook.remove()
    loss = F.cross_entropy(logits.flatten(0, 1), codes.flatten())
    loss.backward()
    results |= {"logits": logits, "loss": loss} | {f"grad.{key}": value for key, value in vim.to_official(with_gradients(net)).items()}
    for name, forgetful in (("exact", False), ("official_cached", True)):
        sampler, _ = vim.from_official(state, num_heads=config["n_heads"], forgetful_cache=forgetful)
        sampler = case.place_model(sampler)
        for j, options in enumerate(config["sample_args"]):
            rule = DrawRule(options.get("softmax_temperature", 1.0), options.get("top_k") or 0, options.get("top_p") or 1.0)
            found, cut = _written(sampler, conds[:, :m], inputs["u"], rule)
            results |= {f"sample{j}.{name}.codes": found, f"sample{j}.{name}.logits": cut}
    return results


def _written(net: VIMTransformer2DModel, conds: Tensor, uniforms: Tensor, rule: DrawRule) -> tuple[Tensor, Tensor]:
    """Write a picture of each condition with stored uniforms [T, b]; return its codes [b, T] and the logits before top-p [b, T, K]."""
    writer, codes, cut = CodeWriter(net, conds), conds[:, :0], []
    for u in uniforms:
        logits = writer.logits(codes)
        cut.append(rule.cut(logits).clamp_min(-1e30))
        codes = torch.cat([codes, inverse_cdf(rule.filtered(logits), u)[:, None]], dim=1)
    return codes, torch.stack(cut, dim=1)


# ---- losses of stage 1 ----


def stage1_losses(case: Case) -> dict[str, Tensor]:
    """Kind vit_vqgan/stage1_losses: reconstruction, perceptual and adversarial terms; the discriminator with and without R1."""
    config, x = case.config, case.inputs["x"]
    lpips, judge = losses.networks(case, StyleDiscriminator(config["size"], x.shape[1]), _loss_formula)
    recon, last = losses.painted(case, 0.5)
    forms, weights = GAN_FORMS[config["disc_loss"]], config["weights"]
    results: dict[str, Tensor] = {"recon": recon}
    per_tap = lpips.per_tap(recon * 2 - 1, x * 2 - 1)
    raw = {"loglaplace": (recon - x).abs().mean(), "loggaussian": (recon - x).square().mean(), "perceptual": per_tap.sum(0).mean()}
    rec = sum((weights[f"{name}_weight"] * value for name, value in raw.items()), start=x.new_zeros(()))
    g, codes, factor = forms[0](judge(recon)), x.new_tensor(config["qloss"]), weights["adversarial_weight"]
    is_adaptive = config["use_adaptive_adv"]
    terms = {"rec": rec, "adversarial": g, "codes": codes}
    found, d_weight = losses.generator_results(terms, recon, last, None if is_adaptive else factor, factor)
    found |= {f"{name}_loss": value for name, value in raw.items()} | {"rec_loss": rec, "g_loss": g, "quant_loss": codes}
    results |= {f"g.{name}": value for name, value in found.items()} | {"g.d_weight": d_weight}
    results |= {"lpips": per_tap.sum(0)[:, None, None, None]}
    results |= {f"lpips.layer{i}": rows[:, None, None, None] for i, rows in enumerate(per_tap)}
    for tag, gamma in (("d_r1.", config["r1_gamma"]), ("d.", 0.0)):
        real, fake = judge(x), judge(recon.detach())
        loss = 0.5 * forms[1](real, fake)
        results |= {f"{tag}logits_real": real.mean(), f"{tag}logits_fake": fake.mean()}
        if gamma:
            penalty = gradient_penalty(judge, x)
            results[f"{tag}r1_reg"] = penalty
            loss = loss + gamma * config["do_r1_every"] / 2 * penalty
        results |= {f"{tag}loss": loss, f"{tag}disc_loss": loss} | losses.gradients_like(case, f"{tag}grad.", judge, loss)
    return results | _judged(cast(StyleDiscriminator, judge), recon.detach(), x)


def _judged(judge: StyleDiscriminator, recon: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Return logits, and mean, spread, first and last number behind every block."""
    kept: dict[str, Tensor] = {}
    hooks = [module.register_forward_hook(keep(kept, f"disc.block{i}_mean_std")) for i, module in enumerate([judge.stem, *judge.blocks])]
    with torch.no_grad():
        logits = judge(recon)
        for hook in hooks:
            hook.remove()
        kept = {name: torch.stack([y.mean(), y.std(), y.flatten()[0], y.flatten()[-1]]) for name, y in kept.items()}
        return kept | {"disc.logits_fake": logits, "disc.logits_real": judge(x)}


def _loss_formula(key: str, r: Tensor) -> Tensor:
    """Return the weight of a loss network that a key stands for."""
    if key.startswith(losses.PERCEPTUAL):
        if ".lin" in key:
            return r.abs() * 0.1
        return 0.05 * r if key.endswith("bias") else r * (2 / r[0].numel()) ** 0.5
    return 0.1 * r if key.endswith("bias") else r
