"""Runners of the SimVQ golden cases."""

from __future__ import annotations

import re
import zlib
from typing import Any, cast

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from genkit.convert import simvq
from genkit.convert.base import build_empty
from genkit.distill.adversarial import GAN_FORMS
from genkit.eval.reconstruction import WINDOWS, ssim_maps
from genkit.parity import _tokenizer_losses as tokenizer_losses
from genkit.parity.base import Case, keep, with_gradients
from genkit.tokenizers.conv_vqgan import ConvVQModel, Level
from genkit.tokenizers.discriminators import LeCam, PatchDiscriminator
from genkit.tokenizers.quantizers import FSQ, LFQ, EMAVectorQuantizer, ResidualQuantizer, SimVQ
from genkit.tokenizers.quantizers.gradient import rotation_trick
from genkit.tokenizers.quantizers.search import half_norms
from genkit.tokenizers.quantizers.stats import CodebookStats
from genkit.training.config import floored_cosine
from genkit.training.ema import EMA


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
    return case.place_model(model)


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


# ---- the image tokenizer ----


def tokenizer(case: Case) -> dict[str, Tensor]:
    """Kind simvq/tokenizer: encoder, quantizer and decoder, stage by stage where weights are stored; gradients; names of averages."""
    config, options = case.config, case.config.get("quantconfig", {})
    is_formula = not (case.dir / "weights.safetensors").is_file()
    state = case.weights(_official_shapes(config) if is_formula else None, _formula)
    model, _ = simvq.from_official(state, beta=options.get("beta", 0.25), legacy=options.get("legacy", False))
    assert isinstance(model, ConvVQModel)
    model = case.place_model(model)
    x = case.place(_formula_picture(config["ddconfig"])) if is_formula else case.inputs["x"]
    results: dict[str, Tensor] = {}
    hooks = [module.register_forward_hook(keep(results, name)) for name, module in _stages(model).items()] if not is_formula else []
    trained = [p for name, p in model.named_parameters() if name != "quantizer.embedding.weight"]
    for p in trained:
        p.requires_grad_(not is_formula)
    out = model(x)
    for hook in hooks:
        hook.remove()
    h, w = model.grid_for(*x.shape[2:])
    results |= {
        "h": rearrange(out.latents, "b (h w) c -> b c h w", h=h, w=w),
        "zq": rearrange(out.quantized, "b (h w) c -> b c h w", h=h, w=w),
        "codes": out.indices.flatten(),
        "commit": out.loss,
        "recon": out.sample,
        "code_gap": _gap(out.latents.flatten(0, 1).detach(), model.quantizer.codebook().detach()),
    }
    if is_formula:
        results.pop("zq")
        return results
    loss = (out.sample - x).abs().mean() + out.loss
    loss.backward()
    gradients = simvq.to_official(with_gradients(model))
    results |= {"loss": loss} | {f"grad.{name}": value for name, value in gradients.items()}
    average = EMA({"model": model}, decay=config["ema_decay"], use_warmup=False)
    own = cast(ConvVQModel, average.modules["model"])
    with torch.no_grad():
        for p in own.parameters():
            p.zero_()
    for step in range(2):
        average.update({"model": model}, step)
    averages = {simvq.AVERAGES + key.replace(".", ""): value for key, value in simvq.to_official(own).items()}
    named = simvq.averaged({**state, **{key: value for key, value in averages.items() if not key.endswith("quantizeembeddingweight")}})
    return results | {name: named[name.removeprefix("ema2.")] for name in case.output_names if name.startswith("ema2.")}


def _stages(model: ConvVQModel) -> dict[str, Any]:
    """Return the modules whose outputs the case stores."""
    found: dict[str, Any] = {"enc.conv_in": model.encoder.conv_in, "enc.mid": model.encoder.mid[-1], "dec.mid": model.decoder.mid[-1]}
    for side, tower, way, name in (("enc", model.encoder, "down", "downsample"), ("dec", model.decoder, "up", "upsample")):
        for i, level in enumerate(tower.levels):
            found[f"{side}.{way}{i}"] = cast(Level, level).blocks[-1]
            if cast(Level, level).resample is not None:
                found[f"{side}.{way}{i}.{name}"] = cast(Level, level).resample
    return found


def _official_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the official tokenizer of a configuration."""
    net = config["ddconfig"]
    quantizer = {"name": "simvq", "codebook_size": config["n_e"], "dim": config["e_dim"]}
    model = build_empty(
        ConvVQModel, quantizer_config=quantizer, channels=net["ch"], multipliers=net["ch_mult"], num_res_blocks=net["num_res_blocks"],
        num_mid_blocks=net["num_res_blocks"],
    )  # fmt: skip
    return {key: tuple(value.shape) for key, value in simvq.to_official(model).items()}


def _formula(key: str, r: Tensor) -> Tensor:
    """Return the weight that a key stands for."""
    if "norm" in key and key.endswith("weight"):
        return 1 + 0.1 * r
    if r.ndim == 1:
        return 0.05 * r
    if key.startswith("quantize."):
        return r * 128**-0.5
    return 0.005 * r if key == "encoder.conv_out.weight" else r / float(np.sqrt(r[0].numel()))


def _formula_picture(net: dict[str, Any]) -> Tensor:
    """Return the picture of cases without stored inputs."""
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(b"x")))
    size = (1, net["in_channels"], net["resolution"], net["resolution"])
    return 2 * torch.from_numpy(generator.random(size, np.float32)) - 1


# ---- losses and metrics of the tokenizer ----


def losses(case: Case) -> dict[str, Tensor]:
    """Kind simvq/losses: L1, LPIPS and PatchGAN of both passes, statistics of its norms, loss functions, learning-rate factors."""
    config, x, options = case.config, case.inputs["x"], case.config["loss_kwargs"]
    empty = PatchDiscriminator(x.shape[1], config["disc_ndf"], config["disc_num_layers"])
    lpips, judge = tokenizer_losses.networks(case, empty, _loss_formula)
    judge.train(config["bn_train"])
    recon, last = tokenizer_losses.painted(case, 0.0)
    distance, l1, commit = lpips(recon, x), (recon - x).abs().mean(), x.new_tensor(config["commit_in"])
    nll, form = l1 + distance.mean(), GAN_FORMS["non_saturating"]
    term = form[0](judge(recon))
    weight, factor = options.get("gen_loss_weight"), options.get("disc_weight", 1.0)
    terms = {"rec": nll, "adversarial": term, "codes": options["commit_weight"] * commit}
    found, d_weight = tokenizer_losses.generator_results(terms, recon, last, weight, factor)
    nothing = dict.fromkeys(("codebook_entropy", "entropy_loss", "per_sample_entropy"), x.new_zeros(()))
    found |= {"reconstruct_loss": l1, "perceptual_loss": distance.mean(), "nll_loss": nll, "g_loss": d_weight * term, "commit_loss": commit}
    found |= {"d_weight": d_weight, "disc_factor": x.new_ones(())} | nothing
    results = {f"g.{name}": value for name, value in found.items()} | {"lpips": distance[:, None, None, None]}
    results |= tokenizer_losses.gradients_like(case, "g.grad_disc.", judge, found["total_loss"])
    real, fake = judge(x), judge(recon.detach())
    hinge = 0.5 * GAN_FORMS["hinge"][1](real, fake)
    results |= {"d.non_saturated_d_loss": hinge, "d.disc_loss": hinge, "d.lecam_loss": x.new_zeros(()), "d.disc_factor": x.new_ones(())}
    results |= {"d.logits_real": real.mean(), "d.logits_fake": fake.mean()}
    results |= tokenizer_losses.gradients_like(case, "d.grad_disc.", judge, hinge)
    results |= {f"bn_after.{key}": value for key, value in judge.state_dict().items() if "running" in key}
    return results | _loss_functions(case.inputs["fn.logits_real"], case.inputs["fn.logits_fake"]) | _rates(case)


def _loss_functions(real: Tensor, fake: Tensor) -> dict[str, Tensor]:
    """Return the adversarial losses of stored logits."""
    return {
        "fn.hinge_d": 0.5 * GAN_FORMS["hinge"][1](real, fake),
        "fn.vanilla_d": 0.5 * GAN_FORMS["vanilla"][1](real, fake),
        "fn.ns_d": GAN_FORMS["non_saturating"][1](real, fake),
        "fn.ns_g": GAN_FORMS["non_saturating"][0](fake),
        "fn.lecam_1step": LeCam()(real, fake),
    }


def _rates(case: Case) -> dict[str, Tensor]:
    """Return the factors of the learning rate from the first step on, of the settings in the names of outputs."""
    found = {}
    for name in case.output_names:
        if match := re.fullmatch(r"sched\.warm(\d+)(?:_cos(\d+)_min([\d.]+))?", name):
            warm, total, floor = int(match[1]), int(match[2]) if match[2] else None, float(match[3] or 1)
            steps = case.output_shapes[name][0]
            found[name] = torch.tensor([floored_cosine(s, warm, total, floor) for s in range(steps)], dtype=torch.float32)
    return found


def eval_metrics(case: Case) -> dict[str, Tensor]:
    """Kind simvq/eval_metrics: SSIM and both PSNRs as the released evaluation computes them, on pixels cut to bytes."""
    x, y = (((v.clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8).float() / 255 for v in (case.inputs["x"], case.inputs["y"]))
    ssim = ssim_maps(y.double(), x.double(), WINDOWS["skimage"])[0].mean((1, 2, 3))
    error = (x - y).double().square().flatten(1).mean(1)
    psnr = -10 * error.log10()
    return {
        "ssim_per_image": ssim, "ssim": ssim.mean(), "psnr_per_image": psnr, "psnr_mean_per_image": psnr.mean(),
        "psnr_official_batch": -10 * error.mean().log10(),
    }  # fmt: skip


def _loss_formula(key: str, r: Tensor) -> Tensor:
    """Return the weight of a loss network that a key stands for."""
    if key.startswith(tokenizer_losses.PERCEPTUAL):
        if ".lin" in key:
            return r.abs() * 0.1
        return 0.05 * r if key.endswith("bias") else r * (2 / r[0].numel()) ** 0.5
    if r.ndim > 1:
        return r * (2 / r[0].numel()) ** 0.5
    if key.endswith("running_var"):
        return 1 + 0.3 * r.abs()
    return 1 + 0.1 * r if key.endswith("weight") else 0.1 * r


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
