"""Runners of the VDT golden cases: network, masks, diffusion mathematics, training loss, masked sampling."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from genkit.blocks.embeddings import sincos_1d, sincos_2d, timestep_embedding
from genkit.convert import vdt
from genkit.data.video_masks import MODES, make_mask
from genkit.generators.vdt import SIZES, VDTTransformer3DModel
from genkit.parity.base import Case, keep
from genkit.schedulers.gaussian import GaussianDiffusion, discretized_log_likelihood, normal_kl
from genkit.tasks._vdt_loss import compose, masked_loss


def _config(case: Case) -> dict[str, Any]:
    """Return the arguments of a case's model."""
    own: Any = case.config.get("model")
    return dict(own if isinstance(own, dict) else case.config)


def _build(case: Case) -> VDTTransformer3DModel:
    """Build the network through the converter, its linear pairs apart."""
    config = _config(case)
    sizes = SIZES.get(str(config.get("model", "")).lower().replace("-", "_").replace("/", "_"), {})
    heads = config.get("num_heads", sizes.get("num_heads"))
    dropout = config.get("class_dropout_prob", 0.1)
    shapes = {}
    if not (case.dir / "weights.safetensors").is_file():
        empty = VDTTransformer3DModel(
            sample_size=config["input_size"], num_classes=config["num_classes"], num_frames=config["num_frames"],
            class_dropout=dropout, **sizes,
        )  # fmt: skip
        shapes = {key: tuple(value.shape) for key, value in vdt.to_official(empty).items()}
    state = case.weights(shapes, lambda key, r: 0.03 * r + (1.0 if key.endswith("temporal_norm1.weight") else 0.0))
    model, _ = vdt.from_official(state, num_heads=heads, class_dropout=dropout, merge=False)
    return model.to(case.device) if case.dtype == torch.float32 else model.to(case.device, case.dtype)


def model(case: Case) -> dict[str, Tensor]:
    """Kind vdt/model: forward with intermediates, label dropping, input gradient, fixed tables."""
    net, inputs = _build(case), case.inputs
    x, t = inputs["x"], inputs["t"]
    (b, f), n = x.shape[:2], net.grid[0] * net.grid[1]
    raw: dict[str, Tensor] = {}
    hooks = []
    for name, module in _watched(net).items():
        hooks.append(module.register_forward_hook(keep(raw, name)))
    with torch.no_grad():
        results = {"out": net(x, t).sample}
    for hook in hooks:
        hook.remove()
    for name, value in raw.items():
        if value.ndim == 2 or name == "x_embedder":
            results[f"act.{name}"] = value.flatten(2).transpose(1, 2) if name == "x_embedder" else value
        elif name.endswith("adaLN_modulation"):
            results[f"act.{name}"] = value.flatten(1)
        elif name.endswith(("temporal_norm1", "temporal_attn")):
            results[f"act.{name}"] = rearrange(value, "b (f n) d -> (b n) f d", f=f)
        else:
            results[f"act.{name}"] = value.reshape(b * f, n, -1)
    for i in range(len(net.blocks)):
        block = results[f"act.blocks.{i}"]
        if f > 3:
            results[f"act.blocks.{i}.frame3_first4tokens"] = block[3, :4]
        results[f"act.blocks.{i}.mean_std"] = torch.stack([block.mean(), block.std()])
    dim = net.config["hidden_size"]
    results |= {"init.pos_embed": sincos_2d(*net.grid, dim)[None], "init.time_embed": sincos_1d(net.config["num_frames"], dim)[None]}
    results |= {f"timestep_embedding_{width}": timestep_embedding(t, width) for width in (256, 9)}
    if "label_drop_u" in inputs:
        with torch.no_grad():
            labels = net.drop_labels(torch.zeros_like(t), inputs["label_drop_u"])
            results["out_train_mode"] = net(x, t, labels).sample
    if "cotangent" in inputs:
        leaf = x.clone().requires_grad_()
        (net(leaf, t).sample * inputs["cotangent"]).sum().backward()
        results["grad_x"] = torch.as_tensor(leaf.grad)
    return {name: value for name, value in results.items() if not case.output_names or name in case.output_names}


def _watched(net: VDTTransformer3DModel) -> dict[str, nn.Module]:
    """Return the modules whose outputs the cases hold, under their official names."""
    found: dict[str, nn.Module] = {"x_embedder": net.patch, "t_embedder": net.timestep, "y_embedder": net.label, "final_layer": net.head}
    for i, block in enumerate(net.blocks):
        found[f"blocks.{i}"] = block
    first: Any = net.blocks[0]
    time, space, mlp = first.branches
    found |= {"blocks.0.temporal_norm1": time.norm, "blocks.0.temporal_attn": time.f.proj, "blocks.0.temporal_fc": time.f.proj2}
    found |= {"blocks.0.norm1": space.norm, "blocks.0.attn": space.f, "blocks.0.norm2": mlp.norm, "blocks.0.mlp": mlp.f}
    return found | {"blocks.0.adaLN_modulation": first.modulation}


class _Recorder:
    """Draws as `random.Random` and notes every draw as (kind, a, b, value)."""

    def __init__(self, seed: int) -> None:
        self.inner, self.rows = random.Random(seed), list[tuple[float, float, float, float]]()

    def uniform(self, a: float, b: float) -> float:
        """Draw uniformly."""
        self.rows.append((0, a, b, value := self.inner.uniform(a, b)))
        return value

    def randint(self, a: int, b: int) -> int:
        """Draw a whole number, both ends included."""
        self.rows.append((1, a, b, value := self.inner.randint(a, b)))
        return value

    def random(self) -> float:
        """Draw from [0, 1)."""
        self.rows.append((2, 0, 1, value := self.inner.random()))
        return value


def masks(case: Case) -> dict[str, Tensor]:
    """Kind vdt/masks: every mode with its draws."""
    results = {}
    for entry in case.config["entries"]:
        draw = _Recorder(entry["seed"])
        mode = "random" if entry["idx"] < 0 else MODES[entry["idx"]]
        frames, height, width = entry["shape"]
        found = make_mask(mode, frames, height, width, draw, ratio=case.config["spatial_mask_ratio"], official=True)
        results[f"mask.{entry['key']}"] = found.to(torch.uint8)
        rows = draw.rows or [(-1.0, -1.0, -1.0, -1.0)]
        results[f"draws.{entry['key']}"] = torch.tensor(rows, dtype=torch.float64)
    return {name: value for name, value in results.items() if not case.output_names or name in case.output_names}


def diffusion_math(case: Case) -> dict[str, Tensor]:
    """Kind vdt/diffusion_math: tables, single steps, loops with a model in closed form."""
    inputs, schedule = case.inputs, case.config["noise_schedule"]
    chain = GaussianDiffusion(schedule)
    results = {f"base.{name}": value for name, value in vars(chain).items() if isinstance(value, Tensor)}
    results["alphas_cumprod_prev_0_and_last"] = chain.alphas_cumprod_prev[[0, -1]]
    for text in case.config["respacings"]:
        kept = GaussianDiffusion(schedule, respacing=text)
        results |= {f"resp[{text}].timestep_map": kept.timesteps, f"resp[{text}].betas": kept.betas}
        results[f"resp[{text}].posterior_log_variance_clipped"] = kept.posterior_log_variance_clipped
    channels = inputs["x0"].shape[1]
    eps, logits = inputs["model_output"][:, :channels], inputs["model_output"][:, channels:]
    rows: dict[str, list[Tensor]] = {}
    for step in inputs["t_list"].tolist():
        t = torch.full((len(inputs["x0"]),), int(step))
        for name, value in _single_steps(chain, inputs, t, eps, logits).items():
            rows.setdefault(name, []).append(value)
    results |= {name: torch.stack(values) for name, values in rows.items()}
    x, mean, scale = inputs["ll_x"], inputs["ll_mean"], inputs["ll_log_scale"]
    results |= {"discretized_ll": discretized_log_likelihood(x, mean, scale), "normal_kl": normal_kl(mean, scale, x, -scale - 3)}
    for loop in case.config["loops"]:
        results |= _closed_loop(loop, schedule, inputs)
    return {name: value for name, value in results.items() if not case.output_names or name in case.output_names}


def _single_steps(chain: GaussianDiffusion, inputs: Mapping[str, Tensor], t: Tensor, eps: Tensor, logits: Tensor) -> dict[str, Tensor]:
    """Compute what one step of the whole chain does."""
    x_0, x_t, noise = inputs["x0"], inputs["x_t"], inputs["noise"]
    found = chain.predict(x_t, t, eps, logits)
    q = chain.add_noise(x_0, noise, t)
    results = {"q_sample": q, "q_posterior_mean": chain.posterior_mean(x_0, x_t, t)}
    results |= {"p_mean": found.mean, "p_log_variance": found.log_variance, "p_pred_xstart": found.clean}
    results["p_sample"] = chain.ancestral_step(x_t, t, eps, logits, noise)[0]
    results["p_sample_clip"] = chain.ancestral_step(x_t, t, eps, logits, noise, clip=True)[0]
    results |= {f"ddim_step_eta{eta}": chain.ddim_step(x_t, t, eps, eta, noise)[0] for eta in (0.0, 0.5, 1.0)}
    return results | {"vb_bits": chain.bound_terms(x_0, q, t, eps, logits)}


def _closed_loop(loop: Mapping[str, Any], schedule: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run a loop with the model that the notes state."""
    chain, linear = GaussianDiffusion(schedule, respacing=loop["respacing"]), GaussianDiffusion("linear")
    x, results, n = inputs["loop_z"], {}, len(chain)
    name = f"loop.{loop['kind']}[{loop['respacing']}]" + (f".eta{float(loop['eta'])}" if loop["kind"] == "ddim" else "")
    name += ".clip" if loop["clip"] else ""
    for k, i in enumerate(reversed(range(n))):
        step = int(chain.timesteps[i])
        a = linear.alphas_cumprod[step].float()
        eps = (1 - a).sqrt() / (0.49 * a + 1 - a) * x + 0.05 * torch.sin(3 * x + step / 100)
        t, noise = torch.full((len(x),), i), inputs["loop_noise"][k]
        if loop["kind"] == "ddim":
            x, _ = chain.ddim_step(x, t, eps, float(loop["eta"]), noise, loop["clip"])
        else:
            x, _ = chain.ancestral_step(x, t, eps, 1.2 * torch.tanh(x), noise, loop["clip"])
        if k == 0:
            results[f"{name}.first"] = x
        if k == n // 2:
            results[f"{name}.mid"] = x
    return results | {f"{name}.final": x}


def _diffusion(options: Mapping[str, Any], learns_sigma: bool) -> GaussianDiffusion:
    """Return the chain of a case's options."""
    small = "fixed_small" if options.get("sigma_small") else "fixed_large"
    return GaussianDiffusion(
        options.get("noise_schedule", "linear"),
        options.get("diffusion_steps", 1000),
        options.get("timestep_respacing", ""),
        options.get("predict_xstart", False),
        "learned_range" if learns_sigma else small,
    )


def train_loss(case: Case) -> dict[str, Tensor]:
    """Kind vdt/train_loss: masked error and variational bound of every mask mode, with gradients."""
    net, inputs = _build(case), case.inputs
    chain = _diffusion(case.config["diffusion"], net.config["learn_sigma"])
    clean, noise, t = inputs["x_start"], rearrange(inputs["noise"], "b c f h w -> b f c h w"), inputs["t"].long()
    results = {"x_t": rearrange(chain.add_noise(clean, noise, t), "b f c h w -> b c f h w")}
    net.requires_grad_(True)
    seen: dict[str, Tensor] = {}

    def run(x: Tensor, step: Tensor) -> Tensor:
        output = net(x, step).sample
        seen.update(model_input=x, model_t=step, model_output=output)
        output.retain_grad()
        return output

    for mode, mask in zip(case.config["modes"], inputs["masks"].bool(), strict=True):
        net.zero_grad()
        found = masked_loss(chain, run, clean, noise, t, mask[None])
        results |= {f"{mode}.{name}": value for name, value in found.items()} | {f"{mode}.loss_mean": found["loss"].mean()}
        if mode != case.config["grad_mode"]:
            continue
        (dvb,) = torch.autograd.grad(found["vb"].sum(), seen["model_output"], retain_graph=True)
        found["loss"].mean().backward()
        results |= {f"{mode}.{name}": value for name, value in seen.items()} | {f"{mode}.dvb_doutput": dvb}
        norms = [p.grad.norm() for p in net.parameters() if p.grad is not None]
        results[f"{mode}.grad_norm_all"] = torch.stack(norms).norm()
        shadow = VDTTransformer3DModel(**{key: value for key, value in net.config.items() if not key.startswith("_")})
        with torch.no_grad():
            for mine, theirs in zip(shadow.parameters(), net.parameters(), strict=True):
                mine.copy_(torch.zeros_like(mine) if theirs.grad is None else theirs.grad)
        results |= {f"{mode}.grad.{key}": value for key, value in vdt.to_official(shadow).items()}
    return {name: value for name, value in results.items() if not case.output_names or name in case.output_names}


def sample(case: Case) -> dict[str, Tensor]:
    """Kind vdt/sample: ancestral and DDIM sampling with given parts, one mask mode per clip."""
    net, inputs, config = _build(case), case.inputs, case.config
    clean, mask = inputs["raw_x"], inputs["masks"].bool()
    channels = clean.shape[2]

    def to_state(x: Tensor) -> Tensor:
        return rearrange(x, "b f c h w -> b c f h w")

    def to_clip(x: Tensor) -> Tensor:
        return rearrange(x, "b c f h w -> b f c h w")

    def evaluate(x: Tensor, step: int, composed: bool = True) -> tuple[Tensor, Tensor | None]:
        given = compose(clean, x, mask) if composed else x
        with torch.no_grad():
            output = net(given, torch.full((len(x),), step)).sample
        return output[:, :, :channels], output[:, :, channels:] if net.config["learn_sigma"] else None

    chain = _diffusion(config["diffusion"], net.config["learn_sigma"])
    x, results, states, deviations = to_clip(inputs["z"]), {"timestep_map": chain.timesteps}, [], []
    hidden = mask[:, :, None].expand_as(clean)
    for k, i in enumerate(reversed(range(len(chain)))):
        t = torch.full((len(x),), i)
        if k == 0:
            eps, logits = evaluate(x, int(chain.timesteps[i]), composed=False)
            plain, _ = chain.ancestral_step(x, t, eps, logits, to_clip(inputs["step_noise"][0]), config["clip_denoised"])
            results["nomask.first_sample"] = to_state(plain)
        eps, logits = evaluate(x, int(chain.timesteps[i]))
        x, found = chain.ancestral_step(x, t, eps, logits, to_clip(inputs["step_noise"][k]), config["clip_denoised"])
        if k == 0:
            first = {"mean": found.mean, "log_variance": found.log_variance, "pred_xstart": found.clean}
            results |= {f"first.{name}": to_state(value) for name, value in first.items()}
        squares = torch.where(hidden, found.clean, 0.0).square().flatten(1).sum(1) / hidden.flatten(1).sum(1)
        deviations.append(squares.sqrt())
        states.append(to_state(x))
        results["pred_xstart_last"] = to_state(found.clean)
    results |= {"sample_steps": torch.stack(states[:-1]), "final_state": states[-1], "pred_xstart_rms_masked": torch.stack(deviations)}
    results["final_video"] = compose(clean, x, mask)
    options = config["ddim"]
    chain = _diffusion({**config["diffusion"], "timestep_respacing": options["respacing"]}, net.config["learn_sigma"])
    x = to_clip(inputs["z"])
    results["ddim.timestep_map"] = chain.timesteps
    for k, i in enumerate(reversed(range(len(chain)))):
        eps, _ = evaluate(x, int(chain.timesteps[i]))
        noise = inputs.get("ddim_step_noise")
        drawn = None if noise is None else to_clip(noise[k])
        x, _ = chain.ddim_step(x, torch.full((len(x),), i), eps, float(options["eta"]), drawn, options["clip_denoised"])
        if k == 0:
            results["ddim.step0"] = to_state(x)
    return results | {"ddim.final_state": to_state(x), "ddim.final_video": compose(clean, x, mask)}
