"""Runners of the ENAT golden cases: network evaluations, the whole sampling loop, one training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from genkit.convert import autonat, enat, maskgit_vqgan
from genkit.convert.base import build_empty
from genkit.generators.enat import ENATCondition, ENATState, ENATTransformer2DModel
from genkit.generators.enat_index import positions_where, take
from genkit.generators.nat import NATTransformer2DModel
from genkit.parity.base import Case, keep, with_gradients
from genkit.schedulers.masked_token import MaskedTokenScheduler, guide
from genkit.tasks._enat_masking import mask_count, mask_counts, mask_more, masked_cross_entropy, random_mask
from genkit.tokenizers.conv_vqgan import ConvVQModel

STATE_OF = {
    "all_masked": None,
    "plain1": None,
    "reuse1_from_all_masked": "all_masked",
    "reuse2_from_plain1": "plain1",
    "reuse3_from_reuse2": "reuse2_from_plain1",
    "plain3": None,
    "reuse3_again_no_new_tokens": "reuse3_from_reuse2",
}
"""Calls of the chain layout, and the call whose state each continues."""


def forward(case: Case) -> dict[str, Tensor]:
    """Kind enat/forward: a chain of evaluations with intermediates, or two grids at the official width."""
    model = _build(case, case.weights(_official_shapes(case.config), _formula))
    with torch.no_grad():
        return _two_grids(model, case.inputs) if "ids1" in case.inputs else _chain(model, case.inputs)


def sample(case: Case) -> dict[str, Tensor]:
    """Kind enat/sample: the sampling loop with stored noise, both guidance branches in one batch."""
    model = _build(case, case.weights())
    results: dict[str, Tensor] = {}
    for run in case.config["runs"]:
        tag = run["tag"] + "."
        inputs = {key.removeprefix(tag): value for key, value in case.inputs.items() if key.startswith(tag)}
        scheduler = MaskedTokenScheduler(
            mask_token_id=model.mask_token_id, token_temperature=run["samp_temp"], mask_temperature=run["mask_temp"]
        )
        scheduler.set_timesteps(run["steps"])
        factors = [scheduler.guidance_at(s, 1 + run["cfg_scale"]) for s in range(run["steps"])]
        with torch.no_grad():
            found = _sample_run(model, scheduler, factors, inputs, {"stack_context": True})
        results |= {tag + name: value for name, value in found.items()}
    return results


def train(case: Case) -> dict[str, Tensor]:
    """Kind enat/train: loss and gradients of a training step without and with the reuse branch."""
    weights = case.weights()
    ema = _build(case, {key.removeprefix("nnet_ema."): value for key, value in weights.items() if key.startswith("nnet_ema.")})
    net = _build(case, {key.removeprefix("nnet."): value for key, value in weights.items() if key.startswith("nnet.")})
    net.train().requires_grad_(True)
    results: dict[str, Tensor] = {}
    for mode in ("plain", "reuse"):
        if f"{mode}.beta" in case.inputs:
            net.zero_grad(set_to_none=True)
            results |= {f"{mode}.{name}": value for name, value in _train_step(net, ema, case, mode).items()}
    return results


def _build(case: Case, state: Mapping[str, Tensor]) -> ENATTransformer2DModel:
    """Build the network through the converter."""
    config = case.config
    model, _ = enat.from_official(
        state,
        num_heads=config["num_heads"],
        num_decoder_layers=config["enc_dec"][1],
        sample_size=config["input_size"],
        dropout=config.get("dropout", 0.1),
        class_dropout=config.get("class_dropout_prob", 0.1),
    )
    return case.place_model(model)


def _official_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return official keys and shapes of a config, for cases whose weights are a formula."""
    names = ("hidden_size", "num_heads", "codebook_size", "num_classes", "mlp_ratio")
    with torch.device("meta"):
        model = ENATTransformer2DModel(
            sample_size=config["input_size"],
            num_encoder_layers=config["enc_dec"][0],
            num_decoder_layers=config["enc_dec"][1],
            **{name: config[name] for name in names},
        )
    return {key: tuple(value.shape) for key, value in enat.to_official(model).items()}


def _formula(key: str, r: Tensor) -> Tensor:
    """Scale a standard normal draw as the official-width case states."""
    if key == "y_embedder.embedding_table.weight":
        return r
    if r.ndim == 1 and key.endswith(("norm.weight", "LayerNorm.weight", "ln.weight")):
        return 1 + 0.1 * r
    return r / r.shape[1] ** 0.5 if r.ndim == 2 else 0.1 * r


def _chain(model: ENATTransformer2DModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run the calls of the chain layout and keep what each computes on the way."""
    labels = inputs["context"].flatten()
    watched: dict[str, nn.Module] = {"x_embedder": model.embedding, "y_embedder": model.class_embedding, "norm": model.norm}
    watched |= {"prev_proj": model.reuse, **{f"block{i}": block for i, block in enumerate(model.blocks)}}
    results: dict[str, Tensor] = {}
    states: dict[str, ENATState] = {}
    for call, source in STATE_OF.items():
        hooks = [module.register_forward_hook(keep(results, f"{call}.{name}")) for name, module in watched.items()]
        out = model(inputs[f"{call}.ids"], {"class_labels": labels}, None if source is None else states[source])
        for hook in hooks:
            hook.remove()
        states[call] = out.state
        results |= {f"{call}.logits": out.logits, f"{call}.feat": out.state.feat, f"{call}.masking": out.state.is_masked.to(torch.uint8)}
    return results


def _two_grids(model: ENATTransformer2DModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run the two-grid layout: one grid, a fuller one with its state, the fuller one alone."""
    condition = model.prepare_condition(inputs["context"].flatten())
    first = model(inputs["ids1"], condition)
    reuse, plain = model(inputs["ids2"], condition, first.state), model(inputs["ids2"], condition)
    masked = reuse.state.is_masked[0]
    return {
        "step1.feat_tokens_0_48": first.state.feat[0, :48],
        "step2_reuse.feat_tokens_0_48": reuse.state.feat[0, :48],
        "step2_reuse.logits_at_masked_0_48": reuse.logits[0, masked][:48],
        "step2_reuse.logits_logsumexp": reuse.logits.logsumexp(-1),
        "step2_reuse.logits_argmax": reuse.logits.argmax(-1),
        "step2_plain.logits_at_masked_0_8": plain.logits[0, masked][:8],
    }


def _sample_run(
    model: ENATTransformer2DModel | NATTransformer2DModel,
    scheduler: MaskedTokenScheduler,
    factors: Sequence[float],
    inputs: Mapping[str, Tensor],
    options: Mapping[str, Any],
) -> dict[str, Tensor]:
    """Run the sampling loop with the guidance factor of each step and the options of `prepare_condition`."""
    labels = inputs["context"].flatten()
    both = (labels, torch.full_like(labels, model.null_class))
    condition, b = ENATCondition.cat([model.prepare_condition(part, **options) for part in both]), len(labels)
    ids = torch.full((b, model.num_tokens), model.mask_token_id, device=labels.device)
    masked = torch.arange(model.num_tokens, device=labels.device).expand(b, -1)
    revealed, state = masked[:, :0], None
    records: dict[str, list[Tensor]] = {name: [] for name in ("ids_in", "num_masked_in", "logits_cond", "logits_uncond", "confidence")}
    for s, factor in enumerate(factors):
        out = model(ids.repeat(2, 1), condition, state, masked_index=masked.repeat(2, 1), new_index=revealed.repeat(2, 1))
        state = out.state
        cond, uncond = out.logits.chunk(2)
        guided = guide(take(cond, masked), take(uncond, masked), factor)
        token_noise, confidence_noise = take(inputs["gumbel_token"][s], masked), inputs["gumbel_conf"][s].gather(1, masked)
        step = scheduler.step(guided, s, ids, masked, token_gumbel=token_noise, confidence_gumbel=confidence_noise)
        confidence = torch.full_like(inputs["gumbel_conf"][s], torch.inf).scatter(1, masked, step.confidence.to(cond.dtype))
        values = (ids, torch.full((b,), masked.shape[1]), cond, uncond, confidence)
        for record, value in zip(records.values(), values, strict=True):
            record.append(value)
        ids, masked, revealed = step.ids, step.masked_index, step.revealed_index
    return {name: torch.stack(values) for name, values in records.items()} | {"final_ids": ids.view(b, *model.grid)}


def _train_step(net: ENATTransformer2DModel, ema: ENATTransformer2DModel, case: Case, mode: str) -> dict[str, Tensor]:
    """Compute one training step on the stored draws of a mode."""
    inputs = {key.removeprefix(f"{mode}."): value for key, value in case.inputs.items()}
    x0, labels = inputs["x0"], inputs["context"].flatten()
    num_tokens, mask_id = net.num_tokens, net.mask_token_id
    count = mask_count(float(inputs["beta"]), num_tokens)
    is_masked = random_mask(inputs["rand_perm"], count)
    ids = x0.masked_fill(is_masked, mask_id)
    results = {"masked_ids": ids, "labels": x0.masked_fill(~is_masked, -1)}
    results["masked_token_ratio"] = inputs["beta"].new_tensor([count / num_tokens])
    state = None
    if mode == "reuse":
        previous = mask_more(ids, inputs["rand_conf"], round((num_tokens - count) * float(inputs["reuse_frac"])), mask_id)
        with torch.no_grad():
            state = ema(previous, {"class_labels": labels}).state
        results |= {"prev_ids": previous, "prev_feat": state.feat, "prev_masking": state.is_masked.to(torch.uint8)}
    masked_index = positions_where(is_masked, count)
    condition = {"class_labels": net.drop_labels(labels, inputs["drop_label"])}
    logits = net(ids, condition, state, masked_index=masked_index, embedding_keep=inputs["dropout_keep"].bool()).logits
    loss = masked_cross_entropy(take(logits, masked_index), x0.gather(1, masked_index), case.config["label_smoothing"])
    loss.backward()
    gradients = {key: p.grad for key, p in net.named_parameters() if p.grad is not None}
    official = {key: value for key, value in enat.TABLE.to_official(gradients).items() if not key.startswith(enat.DEAD)}
    return results | {"logits": logits, "loss": loss[None]} | {f"grad.{key}": value for key, value in official.items()}


# ---- the plain transformer ----


def nat_sample(case: Case) -> dict[str, Tensor]:
    """Kind enat/nat_sample: evaluations of the plain transformer with intermediates, and its loop with a searched strategy."""
    model, inputs = _build_nat(case), case.inputs
    results: dict[str, Tensor] = {}
    with torch.no_grad():
        if "fwd.ids" in inputs:
            results |= _nat_forward(case, model)
        if "sample.context" in inputs:
            scheduler = MaskedTokenScheduler.from_strategy(case.config["strategy"], model.mask_token_id)
            factors = [scheduler.guidance_at(s) for s in range(len(scheduler.timesteps))]
            own = {key.removeprefix("sample."): value for key, value in inputs.items() if key.startswith("sample.")}
            found = _sample_run(model, scheduler, factors, own, {})
            cond, uncond = found.pop("logits_cond"), found.pop("logits_uncond")
            ends = torch.stack([guide(cond[s], uncond[s], factors[s]) for s in (0, -1)])
            results |= {f"sample.{name}": value for name, value in {**found, "guided_logits_first_last": ends}.items()}
    return results


def nat_train(case: Case) -> dict[str, Tensor]:
    """Kind enat/nat_train: an evaluation with intermediates, loss and gradients of one training step."""
    net = _build_nat(case)
    with torch.no_grad():
        results = _nat_forward(case, net)
    net.train().requires_grad_(True)
    inputs = {key.removeprefix("train."): value for key, value in case.inputs.items() if key.startswith("train.")}
    x0, labels = inputs["x0"], inputs["context"].flatten()
    is_masked = random_mask(inputs["rand_perm"], mask_counts(inputs["beta"], net.num_tokens))
    ids = x0.masked_fill(is_masked, net.mask_token_id)
    logits = net(ids, {"class_labels": labels}, embedding_keep=inputs["dropout_keep"].bool()).logits
    loss = masked_cross_entropy(logits[is_masked][None], x0[is_masked][None], case.config["label_smoothing"])
    loss.backward()
    gradients = autonat.to_official(with_gradients(net))
    results |= {"train.masked_ids": ids, "train.labels": x0.masked_fill(~is_masked, -1), "train.loss": loss[None]}
    return results | {f"train.grad.{key}": value for key, value in gradients.items()}


def _build_nat(case: Case) -> NATTransformer2DModel:
    """Build the plain transformer through the converter."""
    config = case.config
    model, _ = autonat.from_official(case.weights(), num_heads=config["num_heads"], sample_size=config["img_size"])
    return case.place_model(model)


def _nat_forward(case: Case, model: NATTransformer2DModel) -> dict[str, Tensor]:
    """Evaluate the plain transformer; intermediates are cut to the lengths that the case stores."""
    results: dict[str, Tensor] = {}
    half = len(model.blocks) // 2
    places = {f"in_blocks.{i}": i for i in range(half)} | {"mid_block": half} | {f"out_blocks.{i}": half + 1 + i for i in range(half)}
    modules: dict[str, nn.Module] = {"token_emb": model.embedding, "context_embed": model.class_embedding, "norm": model.norm}
    modules |= {name: model.blocks[i] for name, i in places.items()}
    hooks = [module.register_forward_hook(keep(results, f"fwd.{name}")) for name, module in modules.items()]
    logits = model(case.inputs["fwd.ids"], {"class_labels": case.inputs["fwd.context"].flatten()}).logits
    for hook in hooks:
        hook.remove()
    shapes = case.output_shapes
    return {"fwd.logits": logits} | {name: value[:, : shapes[name][1]] if name in shapes else value for name, value in results.items()}


# ---- the tokenizer of MaskGIT ----


def vqgan(case: Case) -> dict[str, Tensor]:
    """Kind enat/vqgan: pictures to codes and back, module by module where weights are stored."""
    config = case.config
    is_formula = not (case.dir / "weights.safetensors").is_file()
    model, _ = maskgit_vqgan.from_official(case.weights(_vqgan_shapes(config) if is_formula else None, _vqgan_formula))
    model = case.place_model(model)
    image, codes = case.inputs["image"], case.inputs["codes"]
    results: dict[str, Tensor] = {}
    stored = {name.removeprefix("inter.") for name in case.output_names if name.startswith("inter.")}
    modules = {name: module for name, module in _vqgan_modules(model).items() if name in stored}
    with torch.no_grad():
        hooks = [module.register_forward_hook(keep(results, f"inter.{name}")) for name, module in modules.items()]
        out = model.encode(image * 2 - 1)
        decoded = model.decode(codes).sample
        for hook in hooks:
            hook.remove()
        h, w = model.grid_for(*image.shape[2:])
        reconstruction = model.decode_latents(out.quantized, (h, w))
    results = {name: value[:1] for name, value in results.items()}
    is_grid = config.get("sane_index_shape", False)
    return results | {
        "z": rearrange(out.latents, "b (h w) c -> b c h w", h=h, w=w),
        "quant": rearrange(out.quantized, "b (h w) c -> b c h w", h=h, w=w),
        "emb_loss": out.loss.reshape(1),
        "indices": out.indices if is_grid else out.indices.flatten(),
        "reconstruction": (reconstruction + 1) / 2,
        "decoded_codes": (decoded + 1) / 2,
    }


def _vqgan_modules(model: ConvVQModel) -> dict[str, nn.Module]:
    """Return the tokenizer's modules by the official names of their places."""
    found: dict[str, nn.Module] = {}
    for side, tower, way, resample in (("encoder", model.encoder, "down", "downsample"), ("decoder", model.decoder, "up", "upsample")):
        found |= {f"{side}.conv_in": tower.conv_in, f"{side}.norm_out": tower.norm}
        found |= {f"{side}.mid.block_{i + 1}": block for i, block in enumerate(tower.mid)}
        for i, level in enumerate(cast(Any, tower.levels)):
            found |= {f"{side}.{way}.{i}.block.{j}": block for j, block in enumerate(level.blocks)}
            if level.resample is not None:
                found[f"{side}.{way}.{i}.{resample}"] = level.resample
    return found


def _vqgan_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the official tokenizer of a configuration."""
    net = config["ddconfig"]
    model = build_empty(
        ConvVQModel, quantizer_config={"name": "vq", "codebook_size": config["n_embed"], "dim": config["embed_dim"]}, channels=net["ch"],
        multipliers=net["ch_mult"], num_res_blocks=net["num_res_blocks"], resampling="average", shortcut="branch",
    )  # fmt: skip
    return {key: tuple(value.shape) for key, value in maskgit_vqgan.to_official(model).items()}


def _vqgan_formula(key: str, r: Tensor) -> Tensor:
    """Return the weight that a key stands for."""
    if key == "quantize.embedding.weight":
        return 0.5 * r
    if r.ndim > 1:
        return r / float(r[0].numel()) ** 0.5
    return 1 + 0.1 * r if "norm" in key and key.endswith("weight") else 0.1 * r
