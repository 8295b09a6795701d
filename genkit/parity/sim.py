"""Runners of the SIM golden cases: EDM networks and samplers, losses of SIM and its neighbours, alternating training, the T2I student."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from genkit.convert import edm, sim
from genkit.distill import adversarial, consistency
from genkit.distill import levels as laws
from genkit.distill.denoising import Denoiser, denoising_loss, per_sample
from genkit.distill.matching import DMD, SIM, DiffInstruct, MatchingRule, SiD, constant, hand_over, matching_gradient
from genkit.distill.mean_flow import mean_flow_loss
from genkit.generators import pixart
from genkit.generators.edm import EDMUNet2DModel
from genkit.generators.preconditioning import make_preconditioner
from genkit.parity.base import Case, keep
from genkit.schedulers.edm_heun import EDMHeunScheduler
from genkit.schedulers.noise_levels import linear_table, nearest_level

LOSS_LAWS: dict[str, tuple[laws.Levels, Callable[[Tensor], Tensor]]] = {
    "edm": (laws.LogNormalLevels(), laws.edm_weight),
    "vp": (laws.VPLevels(), laws.inverse_square_weight),
    "ve": (laws.GeometricLevels(), laws.inverse_square_weight),
}


def _formula(key: str, r: Tensor) -> Tensor:
    """Scale a standard normal draw as the cases without stored weights state."""
    parts = key.split(".")
    if parts[-1] == "freqs":
        return 16 * r
    if r.ndim >= 2:
        return r / r[0].numel() ** 0.5
    return 1 + 0.2 * r if "norm" in parts[-2] and parts[-1] == "weight" else 0.1 * r


def _weights(case: Case) -> dict[str, Tensor]:
    """Return the official state dict of a case; constants of the resampling keep their values."""
    with torch.device("cpu"):
        official = edm.to_official(EDMUNet2DModel(**edm.config_of(case.config["precond"], case.config["kwargs"])))
    shapes = {key: tuple(value.shape) for key, value in official.items() if not key.endswith("resample_filter")}
    return {key: value for key, value in official.items() if key.endswith("resample_filter")} | case.weights(shapes, _formula)


def _build(case: Case, state: Mapping[str, Tensor], precond: str | None = None) -> EDMUNet2DModel:
    """Build a denoiser through the converter."""
    model, _ = edm.from_official(state, preconditioner=precond or case.config["precond"], network=case.config["kwargs"])
    return model.to(case.device) if case.dtype == torch.float32 else model.to(case.device, case.dtype)


def _official_gradients(model: EDMUNet2DModel) -> dict[str, Tensor]:
    """Return gradients under the official names and in the official order of rows."""
    clone = EDMUNet2DModel(**{key: value for key, value in model.config.items() if not key.startswith("_")})
    with torch.no_grad():
        for mine, theirs in zip(clone.parameters(), model.parameters(), strict=True):
            mine.copy_(torch.zeros_like(mine) if theirs.grad is None else theirs.grad)
    return edm.to_official(clone)


def edm_network(case: Case) -> dict[str, Tensor]:
    """Kind sim/edm_network: forward with intermediates, other preconditioners, training loss and gradients."""
    inputs, config = case.inputs, case.config
    weights = _weights(case)
    model = _build(case, weights)
    labels, augment = inputs.get("class_labels"), inputs.get("augment_labels")
    results: dict[str, Tensor] = {}
    hooks = [
        model.unet.register_forward_hook(_keep_network(results)),
        model.unet.map_noise.register_forward_hook(keep(results, "map_noise")),
    ]
    for side in ("enc", "dec"):
        for name, module in getattr(model.unet, side).items():
            hooks.append(module.register_forward_hook(keep(results, f"block.{side}.{name}")))
    with torch.no_grad():
        results["D_x"] = model(inputs["x_noisy"], inputs["sigma"], labels, augment).sample
        for hook in hooks:
            hook.remove()
        results["D_x_no_augment"] = model(inputs["x_noisy"], inputs["sigma"], labels).sample
        results["D_x_labels_none"] = model(inputs["x_noisy"], inputs["sigma"], None, augment).sample
        for name, official in (("edm", "EDMPrecond"), ("vp", "VPPrecond")):
            if f"D_x_{name}_precond" in case.output_names:
                other = _build(case, weights, official)
                results[f"D_x_{name}_precond"] = other(inputs["x_noisy"], inputs["sigma"], labels, augment).sample
    results["vp_c_noise"] = make_preconditioner("vp").coefficients(inputs["sigma"].float()).noise
    law, weight = LOSS_LAWS[config["loss"]]
    sigma = law.sigma(inputs["loss.level_draw"]).flatten()
    model.requires_grad_(True)
    loss = denoising_loss(
        lambda x, level: model(x, level, labels).sample, inputs["loss.images"], inputs["loss.noise"], sigma, weight(sigma)
    )
    total = loss.sum() / len(sigma)
    total.backward()
    gradients = _official_gradients(model)
    results |= {"loss.map": loss, "loss.total": total[None]}
    results["loss.grad_norms"] = torch.stack([gradients[key].norm() for key in config["grad_norm_keys"]])
    results |= {f"loss.grad.{key}": value for key, value in gradients.items()}
    return {name: value for name, value in results.items() if not case.output_names or name in case.output_names}


def _keep_network(results: dict[str, Tensor]) -> Callable[[nn.Module, Any, tuple[Tensor, Tensor]], None]:
    """Return a hook that stores what the bare network takes and returns."""

    def hook(module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> None:
        results.update(model_in=args[0], c_noise=args[1], F_x=output[0])

    return hook


SETTINGS = {"S_churn": "s_churn", "S_min": "s_min", "S_max": "s_max", "S_noise": "s_noise"}


def edm_samplers(case: Case) -> dict[str, Tensor]:
    """Kind sim/edm_samplers: whole sampling loops with stored noise."""
    model, labels = _build(case, _weights(case)), case.inputs.get("class_labels")
    results: dict[str, Tensor] = {}
    for name, run in case.config["runs"].items():
        config = {SETTINGS.get(key, key): value for key, value in run.items() if key not in ("sampler", "num_steps")}
        scheduler = EDMHeunScheduler(**config)
        scheduler.set_timesteps(run["num_steps"], preconditioner=model.preconditioner)
        sample = case.inputs["latents"].double() * scheduler.init_noise_sigma
        noise, evaluations = case.inputs.get(f"{name}.noise"), []
        for sigma in scheduler.timesteps:
            drawn = torch.zeros_like(sample) if noise is None else noise[scheduler.index]
            x = scheduler.scale_model_input(sample, sigma, noise=drawn)
            with torch.no_grad():
                denoised = model(x, float(sigma), labels).sample
            evaluations.append((sigma, x.float(), denoised))
            sample = scheduler.step(denoised, sigma, sample).prev_sample
        results[f"{name}.x_final"] = sample
        for key, column in zip(("eval_sigma", "eval_x", "eval_D"), zip(*evaluations, strict=True), strict=True):
            results[f"{name}.{key}"] = torch.stack(list(column))
    return results


def _bound(model: EDMUNet2DModel, labels: Tensor | None) -> Denoiser:
    """Return a denoiser with its condition bound."""
    return lambda x, sigma: model(x, sigma, labels).sample


def _networks(case: Case, names: tuple[str, ...]) -> list[EDMUNet2DModel]:
    """Build the networks whose weights stand under prefixes."""
    weights = case.weights()
    parts = ({key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")} for name in names)
    return [_build(case, part) for part in parts]


def _rule(entry: dict[str, Any]) -> MatchingRule:
    """Return the rule of a case's loss entry."""
    if entry.get("official", "").startswith("SiD"):
        return SiD(alpha=entry["alpha"])
    if "official" in entry:
        return DMD() if entry["official"].startswith("DMD") else DiffInstruct()
    weight = entry["weight"]
    power = float(weight.partition("^")[2] or 1) if weight.startswith("sigma") else 0.0
    return SIM(entry["distance"], entry["c"] or None, entry["space"], power, weight.startswith("0.5/mean"))


def sim_losses(case: Case) -> dict[str, Tensor]:
    """Kind sim/sim_losses: student and critic losses with their gradients, naive and sequential."""
    teacher, fake, generator = _networks(case, ("teacher", "fake", "generator"))
    inputs, config = case.inputs, case.config
    labels, b = inputs["class_labels"], len(inputs["z"])
    level, noise = config["sigma_init"], inputs["noise"]
    sigma = laws.KarrasLevels(last=config["tmax"] / 1000).sigma(inputs["sigma_u"]).flatten()
    fake_sigma = laws.LogNormalLevels().sigma(inputs["fake_level"]).flatten()
    with torch.no_grad():
        x_0 = generator(level * inputs["z"], level, labels).sample
        x_t = x_0 + per_sample(sigma, x_0) * noise
        at_fake, at_teacher = fake(x_t, sigma, labels).sample, teacher(x_t, sigma, labels).sample
    square = per_sample(sigma, x_t) ** 2
    results = {"sigma": sigma.view(-1, 1, 1, 1), "x0": x_0, "x_t": x_t, "D_fake": at_fake, "D_teacher": at_teacher}
    results |= {"score_fake": (at_fake - x_t) / square, "score_teacher": (at_teacher - x_t) / square}
    results |= {"score_conditional": (x_0 - x_t) / square, "y_t": (at_fake - at_teacher) / square}
    for name, entry in config["losses"].items():
        generator.requires_grad_(True).zero_grad()
        picture = generator(level * inputs["z"], level, labels).sample
        rule, where = _rule(entry), (picture, noise, sigma)
        if isinstance(rule, DiffInstruct):
            where = (picture, inputs["fake_noise"], fake_sigma)
        elif "tmax" in entry:
            where = (picture, noise, laws.KarrasLevels(last=entry["tmax"] / 1000).sigma(inputs["sigma_u"]).flatten())
        losses, gradient, _ = matching_gradient(rule, *where, _bound(fake, labels), _bound(teacher, labels))
        hand_over(picture, gradient / b, losses.sum() / b).backward()
        gradients = _official_gradients(generator)
        results |= {f"{name}.per_sample": losses, f"{name}.grad_x0": gradient / b}
        results[f"{name}.grad_norms"] = torch.stack([gradients[key].norm() for key in config["grad_norm_keys"]])
        results |= {f"{name}.grad.{key}": gradients[key] for key in config["grad_keys"]}
    fake.requires_grad_(True)
    loss = denoising_loss(_bound(fake, labels), x_0, inputs["fake_noise"], fake_sigma, laws.edm_weight(fake_sigma))
    (loss.sum() / b).backward()
    gradients = _official_gradients(fake)
    results["fake.per_sample"] = loss.flatten(1).sum(1)
    results["fake.grad_norms"] = torch.stack([gradients[key].norm() for key in config["grad_norm_keys"]])
    return results | {f"fake.grad.{key}": gradients[key] for key in config["grad_keys"]}


def sim_alternating_steps(case: Case) -> dict[str, Tensor]:
    """Kind sim/sim_alternating_steps: critic and student step in turn, the average follows the student."""
    config, inputs = case.config, case.inputs
    results: dict[str, Tensor] = {}
    labels, b, level = inputs["class_labels"], config["batch"], config["sigma_init"]
    levels, critic_levels = laws.KarrasLevels(last=config["tmax"] / 1000), laws.LogNormalLevels()
    modes = {"sid": (SiD(config["sid_alpha"]), config["sid_loss_scaling_G"]), "sim": (SIM(c=config["c"], space=config["sim_space"]), 1.0)}
    for mode, (rule, scale) in modes.items():
        teacher, fake, generator, ema = (_networks(case, ("teacher",))[0] for _ in range(4))
        fake.requires_grad_(True)
        generator.requires_grad_(True)
        settings = {"lr": config["lr"], "betas": tuple(config["betas"]), "eps": config["eps"]}
        critic_optimizer = torch.optim.Adam(fake.parameters(), **settings)
        student_optimizer = torch.optim.Adam(generator.parameters(), **settings)
        for i in range(config["steps"]):
            draws = {key: inputs[f"step{i}.{key}"] for key in ("z_fake", "z_gen", "fake_level", "fake_noise", "sigma_u", "noise")}
            with torch.no_grad():
                x_0 = generator(level * draws["z_fake"], level, labels).sample
            sigma = critic_levels.sigma(draws["fake_level"]).flatten()
            loss = denoising_loss(_bound(fake, labels), x_0, draws["fake_noise"], sigma, laws.edm_weight(sigma)).sum() / b
            critic_optimizer.zero_grad()
            loss.backward()
            critic_optimizer.step()
            picture = generator(level * draws["z_gen"], level, labels).sample
            sigma = levels.sigma(draws["sigma_u"]).flatten()
            with constant(fake):
                losses, gradient, _ = matching_gradient(rule, picture, draws["noise"], sigma, _bound(fake, labels), _bound(teacher, labels))
            student_optimizer.zero_grad()
            hand_over(picture, gradient * (scale / b), losses.sum() * scale / b).backward()
            student_optimizer.step()
            beta = 0.5 ** (b / config["ema_halflife_nimg"])
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(generator.parameters()), 1 - beta)
                results[f"{mode}.step{i}.x0_fixed"] = generator(level * inputs["step0.z_gen"], level, labels).sample
                results[f"{mode}.step{i}.x0_fixed_ema"] = ema(level * inputs["step0.z_gen"], level, labels).sample
            results |= {f"{mode}.step{i}.fake_loss": loss[None], f"{mode}.step{i}.gen_loss": losses.sum()[None] * scale / b}
        for name, network in (("fake", fake), ("generator", generator), ("ema", ema)):
            results |= {f"{mode}.final.{name}.{key}": value for key, value in edm.to_official(network).items()}
    return {name: value for name, value in results.items() if not case.output_names or name in case.output_names}


def distill_neighbours(case: Case) -> dict[str, Tensor]:
    """Kind sim/distill_neighbours: consistency, distribution matching, adversarial, f-divergence and MeanFlow pieces."""
    return _consistency(case) | _distribution_matching(case) | _adversarial(case) | _mean_flow(case)


def _consistency(case: Case) -> dict[str, Tensor]:
    """Compute the consistency losses with both ways to the earlier point."""
    teacher, student = _networks(case, ("teacher", "student"))
    images, noise, t = (case.inputs[f"cd.{name}"] for name in ("images", "noise", "t"))
    r = consistency.earlier_level(t, case.config["cd_ratio"])
    x_t = (images.double() + per_sample(t.double(), images) * noise).float()
    distilled = consistency.euler_step(x_t, t, r, _bound(teacher, None))
    trained = (images.double() + per_sample(r, images) * noise).float()
    results = {"cd.r": r, "cd.x_r": distilled}
    for name, variant in case.config["cd_variants"].items():
        student.requires_grad_(True).zero_grad()
        options = {"weighting": variant["weighting"], "huber_c": variant["huber_c"], "squared": variant["squared_l2"]}
        x_r = trained if name.startswith("ct_") else distilled
        found, loss = consistency.consistency_loss(_bound(student, None), x_t, x_r, t, r, **options)
        loss.mean().backward()
        results |= {f"cd.{name}.unweighted": found, f"cd.{name}.loss": loss}
        results |= {f"cd.{name}.grad.{key}": value for key, value in _official_gradients(student).items()}
    return {name: value for name, value in results.items() if not case.output_names or name in case.output_names}


def _distribution_matching(case: Case) -> dict[str, Tensor]:
    """Compute DMD's surrogate, plain and with weights of the samples."""
    results: dict[str, Tensor] = {}
    fake, teacher = case.inputs["vsd.fake_x0"], case.inputs["vsd.teacher_x0"]
    for name, scale in (("vsd", None), ("vsd_scaled", case.inputs["vsd.scale"])):
        x_0 = case.inputs["vsd.x0"].clone().requires_grad_()
        loss = DMD()(x_0, fake, teacher, torch.ones(len(x_0)), scale).sum() / x_0.numel()
        loss.backward()
        results |= {f"{name}.loss": loss[None], f"{name}.grad_x0": torch.as_tensor(x_0.grad)}
    return results


def _adversarial(case: Case) -> dict[str, Tensor]:
    """Compute the losses on logits and f-distill's weights."""
    fake, real = case.inputs["gan.fake_logits"], case.inputs["gan.real_logits"]
    results = {"gan.gen": adversarial.generator_loss(fake)[None], "gan.disc": adversarial.discriminator_loss(real, fake)[None]}
    results["fdiv.ratio"] = adversarial.density_ratio(fake)
    return results | {f"fdiv.h.{name}": adversarial.f_divergence_weight(fake, name, normalise=False) for name in adversarial.F_DIVERGENCES}


def _mean_flow(case: Case) -> dict[str, Tensor]:
    """Compute the MeanFlow losses on given tensors."""
    config = case.config["mf"]
    results: dict[str, Tensor] = {}
    derivative, velocity, r, t = (case.inputs[f"mf.{name}"] for name in ("jvp", "v", "r", "t"))
    for name, variant in config.items():
        if not isinstance(variant, dict):
            continue
        warmup = min(1.0, config["iteration"] / variant["tangent_warmup_steps"]) if "tangent_warmup_steps" in variant else 1.0
        options = {"power": variant["p"], "c": variant["c"], "warmup": warmup, "on_tangent": variant.get("spatial_invariance", False)}
        u = case.inputs["mf.u"].clone().requires_grad_()
        loss, weight = mean_flow_loss(u, derivative, velocity, r, t, **options)
        loss.mean().backward()
        results |= {f"mf.{name}.loss": loss, f"mf.{name}.weight": weight, f"mf.{name}.grad_u": torch.as_tensor(u.grad)}
    return results


def sim_pixart_onestep(case: Case) -> dict[str, Tensor]:
    """Kind sim/sim_pixart_onestep: the one-step text-to-image student, and the table of noise levels."""
    config, inputs = case.config, case.inputs
    results: dict[str, Tensor] = {}
    model, _ = sim.from_official({**case.weights(), "u": inputs["u"]}, num_heads=config["pixart_kwargs"]["num_heads"])
    model = model.to(case.device, case.dtype)
    table = linear_table(config["M"], config["beta_start"], config["beta_end"], config["C_1"])
    watched = {
        "caption_tokens": model.caption_projection,
        "t_emb": model.adaln_single.emb.timestep_embedder,
        "patches": model.pos_embed.proj,
    }
    watched |= {f"block.{i}": block for i, block in enumerate(model.transformer_blocks)}
    hooks = [module.register_forward_hook(keep(results, name)) for name, module in watched.items()]
    hooks.append(model.register_forward_hook(_keep_transformer(results), with_kwargs=True))
    sigma = torch.full((len(inputs["z"]),), config["sigma_init"], device=case.device)
    with torch.no_grad():
        x = config["sigma_init"] * inputs["z"]
        results["x0"] = pixart.denoise(model, x, sigma, inputs["caption"][:, 0], inputs["mask"].bool(), table)
    for hook in hooks:
        hook.remove()
    results["patch_tokens"] = results.pop("patches").flatten(2).transpose(1, 2)
    results["caption_tokens"] = results["caption_tokens"][:, None]
    index = nearest_level(table, inputs["sigma_probe"])
    probe = {"index": index, "timestep": pixart.timestep_of(inputs["sigma_probe"], table), "rounded": table[index]}
    return results | {f"sigma_probe_{name}": value.float() for name, value in probe.items()}


def _keep_transformer(results: dict[str, Tensor]) -> Callable[[nn.Module, Any, Any, Any], None]:
    """Return a hook that stores what the transformer takes and returns."""

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        results.update(model_in=args[0], timestep=kwargs["timestep"].float(), model_out=output.sample)

    return hook
