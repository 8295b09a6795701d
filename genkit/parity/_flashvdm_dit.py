"""Runners of the golden cases of shape generation: transformer, schedulers, conditioners, distillation losses."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from genkit.blocks.embeddings import sincos_1d, timestep_embedding
from genkit.conditioners import pictures
from genkit.convert import dinov2, shape_dit
from genkit.distill import adversarial
from genkit.distill.progressive_flow import Velocity, consistency_flow_loss, guidance_loss, guided_velocity, jump, phase_ends
from genkit.generators.shape_dit import ShapeDiT
from genkit.parity.base import Case, with_gradients
from genkit.pipelines.shape_flow import flow_steps
from genkit.schedulers.flow_matching import FlowMatchingScheduler, interpolate, logit_normal_times
from genkit.training.ema import EMA

LOGIT_NORMAL = {"mean": 0.0, "std": 1.0, "shift_scale": 3.0}


def _scheduler(name: str, config: dict[str, Any]) -> FlowMatchingScheduler:
    """Build a scheduler by its published name."""
    if name == "ConsistencyFlowMatchEulerDiscreteScheduler":
        names = {"pcm_timesteps": "phases"}
        return FlowMatchingScheduler(steps="consistency", **{names.get(key, key): value for key, value in config.items()})
    return FlowMatchingScheduler(**config)


def _build(case: Case, prefix: str = "") -> ShapeDiT:
    """Build a network through the converter."""
    state = {key.removeprefix(prefix): value for key, value in case.weights().items() if key.startswith(prefix)}
    dit = case.config["dit"]
    model, _ = shape_dit.from_official(state, num_heads=dit["num_heads"])
    return model.to(case.device)


def dit(case: Case) -> dict[str, Tensor]:
    """Kind flashvdm/dit: forward with intermediates, flow-matching loss and gradients, sampling loops."""
    net, inputs = _build(case), case.inputs
    guidance = inputs.get("guidance")
    raw: dict[str, Any] = {}
    watched: dict[str, Any] = {"time_in": net.time_in, "latent_in": net.latent_in, "cond_in": net.context_in, "final_layer": net.head}
    watched |= {f"double_blocks.{i}": block for i, block in enumerate(net.blocks)}
    watched |= {f"single_blocks.{i}": block for i, block in enumerate(net.single_blocks)}
    if net.guidance_in is not None:
        watched["guidance_in"] = net.guidance_in
    hooks = [
        module.register_forward_hook(lambda module, args, output, name=name: raw.__setitem__(name, output))
        for name, module in watched.items()
    ]
    with torch.no_grad():
        results = {"velocity": net(inputs["x"], inputs["t"], inputs["cond"], guidance).sample}
    for hook in hooks:
        hook.remove()
    for i in range(len(net.blocks)):
        raw[f"double_blocks.{i}.latent"], raw[f"double_blocks.{i}.cond"] = raw.pop(f"double_blocks.{i}")
    results |= raw | {"timestep_embedding": timestep_embedding(1000 * inputs["t"], 256, net.config["max_period"])}
    if guidance is not None:
        results["guidance_embedding"] = timestep_embedding(1000 * guidance, 256, net.config["max_period"])
    if "fm.data" in inputs:
        results |= _flow_matching(net, inputs, guidance)
    if "logit_normal.z" in inputs:
        results["logit_normal.t"] = logit_normal_times(inputs["logit_normal.z"], **LOGIT_NORMAL)
    with torch.no_grad():
        for name, loop in case.config.get("loops", {}).items():
            results |= {f"{name}.{key}": value for key, value in _loop(net, loop, inputs[f"{name}.noise"], inputs["cond"]).items()}
    return results if not case.output_names else {name: value for name, value in results.items() if name in case.output_names}


def _flow_matching(net: ShapeDiT, inputs: dict[str, Tensor], guidance: Tensor | None) -> dict[str, Tensor]:
    """Return the loss of flow matching and its gradients by official key."""
    data, noise, t = (inputs[f"fm.{name}"] for name in ("data", "noise", "t"))
    net.requires_grad_(True)
    predicted = net(interpolate(data, noise, t), t, inputs["cond"], guidance).sample
    losses = (predicted - (data - noise)).square().flatten(1).mean(1)
    losses.mean().backward()
    found = {"fm.pred": predicted.detach(), "fm.loss_per_sample": losses.detach(), "fm.loss": losses.mean().detach()}
    found |= {f"fm.grad.{key}": value for key, value in shape_dit.to_official(with_gradients(net)).items()}
    net.requires_grad_(False)
    return found


def _loop(net: ShapeDiT, loop: dict[str, Any], noise: Tensor, cond: Tensor) -> dict[str, Tensor]:
    """Sample as the published pipeline does."""
    scheduler = _scheduler(loop["scheduler"], loop["scheduler_config"])
    scheduler.set_timesteps(loop["steps"])
    scale = loop["guidance_scale"] if loop["guidance_scale"] >= 0 else 1.0
    steps = list(flow_steps(net, scheduler, noise, cond, scale))
    found = {"timesteps": scheduler.timesteps, "sigmas": scheduler.sigmas, "final": steps[-1].prev_sample}
    found["traj"] = torch.stack([step.prev_sample for step in steps])
    return found | {"pred_original": torch.stack([step.pred_original_sample for step in steps])}


def schedulers(case: Case) -> dict[str, Tensor]:
    """Kind flashvdm/schedulers: tables, steps and the published noising of several settings."""
    results: dict[str, Tensor] = {}
    for name, job in case.config.items():
        if not isinstance(job, dict):
            continue
        scheduler, count = _scheduler(job["scheduler"], job["config"]), job["num_inference_steps"]
        table = scheduler.table
        results |= {f"{name}.init_sigmas": table, f"{name}.init_timesteps": table * scheduler.config["num_train_timesteps"]}
        sample, velocities, t = (case.inputs.get(f"{name}.{key}") for key in ("x", "v", "scale_noise.t"))
        if t is not None:  # published with noise and data the other way round
            times = t / scheduler.config["num_train_timesteps"]
            results[f"{name}.scale_noise.out"] = interpolate(
                case.inputs[f"{name}.scale_noise.noise"], case.inputs[f"{name}.scale_noise.sample"], times
            )
        times = None if job["sigmas_arg"] else torch.linspace(float(table[0]), float(table[-1]), count, dtype=torch.float64)
        scheduler.set_timesteps(count, sigmas=times, mu=job["mu"])
        results |= {f"{name}.timesteps": scheduler.timesteps, f"{name}.sigmas": scheduler.sigmas}
        assert sample is not None
        assert velocities is not None
        states = []
        for i, velocity in enumerate(velocities):
            sample = scheduler.step(velocity, i, sample).prev_sample
            states.append(sample)
        results[f"{name}.traj"] = torch.stack(states)
    return results


def distill_reference(case: Case) -> dict[str, Tensor]:
    """Kind flashvdm/distill_reference: guidance distillation, consistency flow distillation, averaging, hinge losses."""
    config, inputs = case.config, case.inputs
    nets = {role: _build(case, f"{role}.") for role in ("teacher", "student", "target", "solver")}
    x0, x1, cond, w, index = (inputs[name] for name in ("x0", "x1", "cond", "w", "index"))
    scheduler = FlowMatchingScheduler(config["num_train_timesteps"], steps="consistency", phases=config["pcm_timesteps"])
    table = torch.cat([scheduler.table, torch.ones(1)])

    def velocity(role: str) -> Velocity:
        return lambda x, t: nets[role](x, t, cond, w).sample

    results = {"sigma_table": table} | _guidance_stage(nets, inputs)
    time, next_time = table[index], table[index + 1]
    student = nets["student"]
    for phases in (5, 1):
        end, x = phase_ends(scheduler.table, time, phases), interpolate(x1, x0, time)
        with torch.no_grad():
            following = jump(x, time, next_time, velocity("solver"))
            reached = torch.where((next_time == end)[:, None, None], following, jump(following, next_time, end, velocity("target")))
        student.requires_grad_(True).zero_grad()
        points = {"x": x, "following": following, "time": time, "next_time": next_time, "end": end}
        loss = consistency_flow_loss(velocity("student"), velocity("target"), **points, c=config["huber_c"]).mean()
        loss.backward()
        with torch.no_grad():
            made = jump(x, time, end, velocity("student"))
        shadow = shape_dit.to_official(with_gradients(student))
        found = {"phase_end": end, "x": x, "x_hat": following, "f_target": reached, "f_student": made, "loss": loss.detach()}
        found |= {"grad_latent_in": shadow["latent_in.weight"], "grad_linear1": shadow["single_blocks.0.linear1.weight"]}
        results |= {f"stage2.p{phases}.{name}": value for name, value in found.items()}
    average = EMA({"net": nets["target"]}, config["ema_decay"], use_warmup=False)
    average.update({"net": student}, 0)
    results["ema.after"] = cast(ShapeDiT, average.modules["net"]).head.weight
    results["adv.d_loss"] = adversarial.hinge_discriminator_loss(inputs["disc.real"], inputs["disc.fake"])
    results["adv.g_loss"] = adversarial.hinge_generator_loss(inputs["disc.fake"])
    return results


def _guidance_stage(nets: dict[str, ShapeDiT], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return guidance distillation: velocities, loss, gradients."""
    x, t, cond, w = interpolate(inputs["x1"], inputs["x0"], inputs["t"]), inputs["t"], inputs["cond"], inputs["w"]
    teacher, student = nets["teacher"], nets["student"].requires_grad_(True)
    with torch.no_grad():
        null = teacher(x, t, torch.zeros_like(cond[:, :1]), context_count=cond.shape[1]).sample
        guided = guided_velocity(teacher(x, t, cond).sample, null, w)
    made = student(x, t, cond, w).sample
    loss = guidance_loss(made, guided).mean()
    loss.backward()
    shadow = shape_dit.to_official(with_gradients(student))
    names = ("final_layer.linear.weight", "guidance_in.out_layer.weight")
    found = {"v_cfg": guided, "v_student": made.detach(), "loss": loss.detach()} | {f"grad.{name}": shadow[name] for name in names}
    return {f"stage1.{name}": value for name, value in found.items()}


def conditioner(case: Case) -> dict[str, Tensor]:
    """Kind flashvdm/conditioner: cutting out, DINOv2 tokens of one picture and of several views."""
    config, inputs = case.config, case.inputs
    results: dict[str, Tensor] = {}
    for name in ("single", "mv"):
        sizes = config[name]["kwargs"]
        state = {key.removeprefix(f"{name}."): value for key, value in case.weights().items() if key.startswith(f"{name}.")}
        encoder, _ = dinov2.from_official(state, num_heads=sizes["config"]["num_attention_heads"])
        images = inputs[f"{name}.image"]
        if name == "mv":
            views = inputs["mv.view_idxs"].tolist()
            tokens = pictures.encode_views(images, views, encoder, sizes["image_size"], sizes["view_num"])
            results |= {"mv.main": tokens, "mv.uncond_shape": torch.tensor(tokens.shape)}
            results["mv.view_embed"] = sincos_1d(sizes["view_num"], tokens.shape[-1])
            continue
        tokens = pictures.encode_pictures(images, encoder, sizes["image_size"])
        pixels = pictures.dino_pixels(images, sizes["image_size"])
        results |= {"single.pixel_values": pixels, "single.main": tokens, "single.uncond": torch.zeros_like(tokens)}
        with torch.no_grad():
            hidden = encoder(pixels, output_hidden_states=True).hidden_states
        results |= {f"single.hidden{i}": value for i, value in enumerate(hidden)}
    processor = config["processor"]
    picture, mask = pictures.recentred(inputs["proc.rgba_uint8"].numpy(), processor["br"])
    results |= {"proc.recentered": torch.from_numpy(picture), "proc.recentered_mask": torch.from_numpy(mask)}
    image, alpha = (pictures.to_condition(part, processor["size"]) for part in (picture, mask))
    return results | {"proc.image": image, "proc.mask": alpha}
