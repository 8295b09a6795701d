"""Runners of the MeshAnything golden cases."""

from __future__ import annotations

import math
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from genkit.convert import mesh_vq, meshanything, michelangelo
from genkit.data.mesh_augment import Augmentation, augmented, centred_box, condition_points, normalised_points
from genkit.data.mesh_fields import triangle_distances
from genkit.data.winding import winding_numbers
from genkit.generators.mesh_transformer import MeshTransformer
from genkit.parity.base import Case, with_gradients
from genkit.pipelines.mesh_loop import SequenceWriter, TokenSampling
from genkit.pipelines.surface_shell import surface_shell
from genkit.pipelines.token_draws import inverse_cdf
from genkit.tasks.mesh_generation import next_token_loss
from genkit.tokenizers.mesh_tokens import (
    EOS,
    PAD,
    SPECIALS,
    AdjacentTokens,
    FaceTokens,
    canonical,
    dequantised,
    quantised,
    released_triangles,
)  # fmt: skip
from genkit.tokenizers.mesh_vae import MeshVQModel
from genkit.tokenizers.point_encoder import PointEncoder, PointFeatures
from genkit.tokenizers.quantizers.residual import ResidualQuantizer
from genkit.tokenizers.quantizers.vq import VectorQuantizer
from genkit.training.config import whole_cosine
from genkit.weights import read_safetensors

NOTHING = -9.0  # what NaN is stored as
MINUS_INFINITY = -1e30
Model = TypeVar("Model", bound=torch.nn.Module)


def _build(case: Case, state: dict[str, Tensor] | None = None, **options: Any) -> tuple[MeshTransformer, PointEncoder]:
    """Build transformer and point encoder through the converters."""
    state = case.weights() if state is None else state
    sizes = case.config.get("transformer", {})
    heads = {"heads": sizes["num_attention_heads"]} if sizes else {}
    net, _ = meshanything.from_official(state, **heads, **options)
    points = case.config.get("point_encoder", {})
    kept = {name: points[name] for name in ("heads", "num_freqs", "include_pi") if name in points}
    encoder, _ = michelangelo.from_official(state, **kept)
    return _placed(net, case), _placed(encoder, case)


def _placed(model: Model, case: Case) -> Model:
    """Move a model to the case's device and type."""
    model = model.to(case.device)
    return model if case.dtype == torch.float32 else model.to(case.dtype)


# ---- sequences ----


def _write(
    net: MeshTransformer, prefix: Tensor, count: int, sampling: TokenSampling, uniforms: Tensor | None = None
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Write up to `count` ids without grammar until all rows have ended; return them, and raw and filtered logits."""
    writer, raw, filtered = SequenceWriter(net, prefix), [], []
    is_done = torch.zeros(len(prefix), dtype=torch.bool, device=prefix.device)
    for t in range(count):
        logits = writer.logits()
        kept = sampling.filtered(logits)
        raw.append(logits)
        filtered.append(kept)
        ids = logits.argmax(-1) if uniforms is None else inverse_cdf(kept, uniforms[:, t])
        ids = torch.where(is_done, PAD, ids)
        is_done |= ids == EOS
        writer.push(ids)
        if bool(is_done.all()):
            break
    return writer.ids, raw, filtered


def _stacked(logits: list[Tensor], count: int) -> Tensor:
    return torch.stack(logits[:count], dim=1).masked_fill(torch.stack(logits[:count], dim=1) == -torch.inf, MINUS_INFINITY)


def _buffer(ids: Tensor, length: int) -> Tensor:
    """Return ids in the released code's buffer, which was filled with ends."""
    return F.pad(ids, (0, length - ids.shape[1]), value=EOS)


def _detokenised(rows: list[np.ndarray], bins: int) -> tuple[Tensor, Tensor]:
    """Return the triangles of sequences as the released code reads them, and how many are whole."""
    found = [torch.from_numpy(released_triangles(row, bins)) for row in rows]
    valid = torch.tensor([int(torch.isfinite(part).all(-1).all(-1).sum()) for part in found])
    width = int(valid.max()) + 2
    padded = [F.pad(part[:width], (0, 0, 0, 0, 0, width - min(width, len(part))), value=math.nan) for part in found]
    return torch.stack(padded).nan_to_num(nan=NOTHING), valid


def v2(case: Case) -> dict[str, Tensor]:
    """Kind meshanything/v2: encoder, training step, generation, reading of sequences."""
    config, inputs = case.config, case.inputs
    net, encoder = _build(case, num_points=config["cond_length"])
    with torch.no_grad():
        features = encoder(inputs["pc_normal"])
        prefix = net.prefix(features)
    results: dict[str, Tensor] = {"point_feature": features.tokens, "shape_latents": features.shape_tokens, "train.prefix_embeds": prefix}
    results |= _train(net, features, inputs["sequence"])
    net.requires_grad_(False)
    length = config["max_length"] - config["cond_length"]
    uniforms = inputs["uniforms"]
    with torch.no_grad():
        for name, sampling, drawn in (("greedy", TokenSampling(), None), ("sample", TokenSampling(do_sample=True), uniforms)):
            ids, raw, filtered = _write(net, prefix, length, sampling, drawn)
            body = _buffer(ids, length)[:, 1:-1].cpu().numpy()
            faces, valid = _detokenised([np.where(row < SPECIALS, -1, row - SPECIALS) for row in body], net.config["bins"])
            results |= {f"{name}.tokens": ids, f"{name}.faces": faces, f"{name}.num_valid_faces": valid}
            if name == "greedy":
                kept = min(40, len(raw))
                teacher = net(ids, prefix).logits[:, prefix.shape[1] - 1 :][:, :kept]
                results |= {
                    "greedy.scores": _stacked(raw, kept),
                    "greedy.nocache_logits": teacher,
                    "greedy.face_ids": net.tokens.slots(ids),
                }
            else:
                results["sample.filtered_scores"] = _stacked(filtered, 24)
    rows = [row.astype(np.int64) for row in inputs["detok_sequences"].cpu().numpy()]
    results["detok.faces"], results["detok.num_valid_faces"] = _detokenised(rows, net.config["bins"])
    rate = config["lr_args"]
    shares = rate["warm_lr_epochs"] / rate["max_epoch"], rate["warm_lr"] / rate["base_lr"], rate["final_lr"] / rate["base_lr"]
    values = [rate["base_lr"] * whole_cosine(point, *shares) for point in config["lr_points"]]
    results["lr.values"] = torch.tensor(values, dtype=torch.float64)
    return results | _steps(case, features)


def _ids_of(sequence: Tensor) -> Tensor:
    """Return ids with bos and end of tokens [b, t] that are padded with -1."""
    body = F.pad(torch.where(sequence >= 0, sequence + SPECIALS, PAD), (1, 1), value=PAD)
    body[:, 0] = 0
    lengths = (sequence >= 0).sum(1)
    body[torch.arange(len(body)), lengths + 1] = EOS
    longest = int(lengths.max()) + 2
    return body[:, :longest]


def _train(net: MeshTransformer, features: PointFeatures, sequence: Tensor) -> dict[str, Tensor]:
    """Return the teacher-forced pass, its loss and gradients by official key."""
    net.requires_grad_(True)
    hidden: dict[str, Tensor] = {}
    hooks = [
        block.register_forward_hook(lambda module, args, output, i=i: hidden.__setitem__(f"train.hidden.layer{i}", output))
        for i, block in enumerate(net.blocks)
    ]
    ids = _ids_of(sequence)
    prefix = net.prefix(features)
    logits = net(ids, prefix).logits
    for hook in hooks:
        hook.remove()
    loss = next_token_loss(logits[:, prefix.shape[1] - 1 : -1], ids, score_first_pad=True)
    loss.backward()
    official = meshanything.to_official(with_gradients(net))
    official["transformer.model.decoder.embed_tokens.weight"] = official["transformer.lm_head.weight"]
    present = torch.cat([torch.ones(len(ids), prefix.shape[1], dtype=torch.long), (ids != PAD).long()], dim=1)
    results = {f"train.grad.{key}": value for key, value in official.items()} | hidden
    results |= {"train.input_ids": ids, "train.face_ids": net.tokens.slots(ids), "train.attention_mask": present}
    return results | {"train.logits": logits, "train.loss": loss}


def _steps(case: Case, features: PointFeatures) -> dict[str, Tensor]:
    """Return losses and norms of gradients of AdamW steps from the stored weights."""
    net, _ = _build(case, num_points=case.config["cond_length"])
    net.requires_grad_(True)
    settings = dict(case.config["adamw"])
    clip = settings.pop("clip")
    optimizer = torch.optim.AdamW(net.parameters(), **{**settings, "betas": tuple(settings["betas"])})
    ids, losses, norms = _ids_of(case.inputs["sequence"]), [], []
    for _ in range(case.output_shapes.get("steps.loss", (4,))[0]):
        prefix = net.prefix(features)
        loss = next_token_loss(net(ids, prefix).logits[:, prefix.shape[1] - 1 : -1], ids, score_first_pad=True)
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(net.parameters(), clip))
        optimizer.step()
        losses.append(loss.detach())
    return {"steps.loss": torch.stack(losses), "steps.grad_norm": torch.stack(norms)}


def v1(case: Case) -> dict[str, Tensor]:
    """Kind meshanything/v1: mesh decoder, logits through the cache, generation end to end, loss and gradients."""
    config, inputs = case.config, case.inputs
    most = config["n_max_triangles"]
    net, encoder = _build(case, num_points=config["cond_length"], max_tokens=9 * most + 2)
    decoder, _ = mesh_vq.from_official(case.weights(), heads=config["decoder"]["num_attention_heads"], num_faces=most)
    decoder = _placed(decoder, case)
    ids = inputs["tf_input_ids"]
    with torch.no_grad():
        features = encoder(inputs["pc_normal"])
        prefix = net.prefix(features)
        results: dict[str, Tensor] = {"point_feature": features.tokens, "prefix_embeds": prefix}
        results |= _decoded(decoder, inputs["codes"], features)
        results["prefix_logits"] = net(ids[:, :0], prefix).logits
        writer, logits = SequenceWriter(net, prefix), []
        for column in ids.T:
            logits.append(writer.logits())
            writer.push(column)
        logits.append(writer.logits())
        cache: Any = writer.cache
        results |= {"tf_logits": torch.stack(logits, dim=1), "tf_slots": net.tokens.slots(ids)}
        results["tf_past_key_layer1"] = cache[1][0].k[:, :, : writer.places]
        counts = {name: case.output_shapes.get(f"{name}_tokens", (0, 9 * most + 2))[1] for name in ("greedy", "sample")}
        for name, sampling, drawn in (("greedy", TokenSampling(), None), ("sample", TokenSampling(do_sample=True), inputs["uniforms"])):
            found, raw, filtered = _write(net, prefix, counts[name], sampling, drawn)
            body = _buffer(found, 9 * most + 2)[:, 1:-1]
            codes = torch.where(body < SPECIALS, -1, body - SPECIALS)
            scores = (
                {"greedy_scores": _stacked(raw, len(raw))} if name == "greedy" else {"sample_filtered_scores": _stacked(filtered, len(raw))}
            )
            faces, valid = _faces(decoder, codes, features)
            results |= {f"{name}_tokens": found, **scores, f"{name}_faces": faces, f"{name}_face_valid": valid}
    net.requires_grad_(True)
    prefix = net.prefix(features)
    predicted = net(ids, prefix).logits[:, prefix.shape[1] - 1 : -1]
    loss = next_token_loss(predicted, ids)
    loss.backward()
    official = meshanything.to_official(with_gradients(net))
    return results | {"ce_loss": loss} | {f"grad.{key}": value for key, value in official.items()}


def _decoded(decoder: MeshVQModel, codes: Tensor, features: PointFeatures) -> dict[str, Tensor]:
    """Return the decoder's intermediates and results for codes [b, 9 f]."""
    raw: dict[str, Any] = {}
    blocks = cast(Any, decoder.blocks)
    watched = {"decoder_layer0": blocks[0], "decoder_out": blocks[-1]}
    hooks = [
        module.register_forward_hook(lambda module, args, output, name=name: raw.__setitem__(name, output))
        for name, module in watched.items()
    ]
    hooks.append(blocks[0].register_forward_pre_hook(lambda module, args: raw.__setitem__("decoder_in", args[0])))
    out = decoder.decode(codes, features)
    for hook in hooks:
        hook.remove()
    faces, valid = _faces(decoder, codes, features)
    present = int((codes[0] >= 0).nonzero().max()) // 9 + 1  # rows of item 0 without what only pads
    first = PointFeatures(tokens=features.tokens[:1], shape_tokens=features.shape_tokens[:1])
    config = {key: value for key, value in decoder.config.items() if not key.startswith("_")} | {"num_faces": present}
    trimmed = MeshVQModel(**config).to(codes.device)
    trimmed.load_state_dict(decoder.state_dict())
    embedded = decoder.quantizer.lookup(codes.unflatten(1, (-1, 3)))
    return {
        **raw, "code_embed": embedded, "coor_logits": out.logits, "faces": faces, "face_valid": valid,
        "trimmed_item0_coor_logits": trimmed.eval().decode(codes[:1, : 9 * present], first).logits,
    }  # fmt: skip


def _faces(decoder: MeshVQModel, codes: Tensor, features: PointFeatures) -> tuple[Tensor, Tensor]:
    """Return the faces [b, f, 3, 3] of codes and which are there."""
    out = decoder.decode(codes, features)
    positions = torch.from_numpy(dequantised(out.steps.cpu().numpy(), decoder.config["bins"])).float()
    return positions.masked_fill(~out.valid.cpu()[..., None, None], NOTHING), out.valid.long()


def v2_official_size(case: Case) -> dict[str, Tensor]:
    """Kind meshanything/v2_official_size: features, prefix and logits of the published size, weights by formula."""
    with torch.device("meta"):
        shell, encoder_shell = MeshTransformer(), PointEncoder()
    shapes = {key: tuple(value.shape) for key, value in meshanything.to_official(shell).items()}
    shapes |= {f"point_encoder.{key}": tuple(value.shape) for key, value in michelangelo.to_official(encoder_shell).items()}
    state = case.weights(shapes, _formula)
    net, encoder = _build(case, state)
    inputs = case.inputs
    with torch.no_grad():
        features = encoder(inputs["pc_normal"])
        prefix = net.prefix(features)
        writer, logits = SequenceWriter(net, prefix), []
        for column in inputs["tokens"].T:
            logits.append(writer.logits())
            writer.push(column)
        logits.append(writer.logits())
    cache: Any = writer.cache
    return {
        "point_feature": features.tokens[:, ::4], "shape_latents": features.shape_tokens[:, ::8], "prefix_embeds": prefix[:, ::8],
        "logits": torch.stack(logits, dim=1), "past_key_layer23_last": cache[23][0].k[:, :, writer.places - 1],
    }  # fmt: skip


def _formula(key: str, r: Tensor) -> Tensor:
    """Scale a standard normal draw as the case of the official size states."""
    *_, parent, last = ("", *key.split("."))
    if ("layer_norm" in parent or parent.startswith("ln_")) and last == "weight":
        return 1 + 0.05 * r
    if last == "bias":
        return 0.02 * r
    if key.endswith("encoder.query") or "embed" in parent:
        return 0.5 * r
    return r / torch.tensor(r.shape[-1], dtype=torch.float32).sqrt()


def rvq(case: Case) -> dict[str, Tensor]:
    """Kind meshanything/rvq: residual quantization with nearest and with drawn codes, gradients."""
    config, inputs = case.config, case.inputs
    table = case.weights()["codebook"].to(case.device)
    tables = table[None] if table.ndim == 2 else table
    options = {"num_levels": config["num_quantizers"], "is_shared": config["shared_codebook"]}
    quantizer = ResidualQuantizer(lambda: VectorQuantizer(config["codebook_size"], config["dim"], beta=1.0), **options).to(case.device)
    for layer, codes in zip(quantizer.layers, tables, strict=True):
        cast(VectorQuantizer, layer).set_codes(codes)
    x = inputs["x"].clone().requires_grad_(True)
    with torch.no_grad():
        plain = quantizer(x)
    results = {"indices": plain.indices, "quantized": plain.quantized}
    residual = x.detach()
    for level in range(config["num_quantizers"]):
        residual = residual - F.embedding(plain.indices[..., level], quantizer.level(level).codebook())
        results[f"residual{level}"] = residual
    noisy = quantizer(x, inputs["gumbel"], config["temperature"])
    commitments = torch.stack([noisy.terms[f"commitment_{i}"] for i in range(config["num_quantizers"])])
    ((noisy.quantized * inputs["w"]).sum() + commitments.sum()).backward()
    results |= {"noisy_indices": noisy.indices, "noisy_quantized": noisy.quantized, "noisy_commit_losses": commitments}
    return results | {"grad_x": cast(Tensor, x.grad)}


# ---- meshes ----


def mesh_tokens(case: Case) -> dict[str, Tensor]:
    """Kind meshanything/mesh_tokens: order, tokens, their reading, augmentation, points, the shell."""
    config = case.config
    arrays = {name: value.numpy() for name, value in read_safetensors(case.dir / "inputs.safetensors").items()}
    bins = config["n_discrete"]
    results: dict[str, Any] = {}
    for name in config["meshes"]:
        mesh = canonical(quantised(centred_box(arrays[f"{name}.vertices"]), bins), arrays[f"{name}.faces"])
        layout = AdjacentTokens(bins)
        tokens = layout.encode(mesh)
        triangles = layout.decode(tokens).triangles
        clean = canonical(triangles.reshape(-1, 3), np.arange(3 * len(triangles)).reshape(-1, 3))
        found = {"sorted_vertices_q": mesh.vertices, "sorted_faces": mesh.faces, "sequence": tokens}
        found |= {"slots": layout.slots(torch.from_numpy(tokens)[None] + SPECIALS)[0].numpy()}
        found |= {"naive_sequence": FaceTokens(bins).encode(mesh), "detok_faces": dequantised(triangles, bins).astype(np.float32)}
        found |= {"final_num_vertices_faces": np.array([len(clean.vertices), len(clean.faces)])}
        results |= {f"{name}.{key}": value for key, value in found.items()}
    results |= _item(case, arrays, bins) | _shell(case, arrays)
    results["pc.normalised_fp16"] = normalised_points(arrays["pc.raw"]).points
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in results.items()}


def _item(case: Case, arrays: dict[str, Any], bins: int) -> dict[str, Any]:
    """Return a training item with stored draws, padded as stored."""
    name, draws = case.config["aug"]["mesh"], arrays["aug.draws"]
    faces = arrays[f"{name}.faces"]
    positions = augmented(arrays[f"{name}.vertices"].astype(np.float64), Augmentation(tuple(draws[:3]), float(draws[3]), tuple(draws[4:])))
    mesh, layout = canonical(quantised(positions, bins), faces), AdjacentTokens(bins)
    tokens = layout.encode(mesh)
    slots = layout.slots(torch.from_numpy(tokens)[None] + SPECIALS)[0].numpy()
    values = {
        "vertices": mesh.positions(bins).astype(np.float16), "faces": mesh.faces, "sequence": tokens, "id_sequence": slots,
        "gt_v": positions.astype(np.float16), "gt_f": faces,
    }  # fmt: skip
    found = {"aug.pc_normal": condition_points(mesh.positions(bins), mesh.faces, arrays["aug.u_face"], arrays["aug.u_bary"])}
    for key, value in values.items():
        rows = case.output_shapes.get(f"aug.{key}", value.shape)[0]
        found[f"aug.{key}"] = np.concatenate([value, np.full((rows - len(value), *value.shape[1:]), -1, value.dtype)])
    return found


def _shell(case: Case, arrays: dict[str, Any]) -> dict[str, Any]:
    """Return the surface around a mesh, and the signed distance that the released code computes for it."""
    import trimesh

    size = 2 ** case.config["mc"]["octree_depth"]
    mesh = trimesh.Trimesh(arrays["mc.vertices"], arrays["mc.faces"], process=False)
    vertices = arrays["mc.vertices"]
    low, high = vertices.min(0), vertices.max(0)
    scaled = (vertices - (low + high) / 2) * (2 * case.config["mc"]["scale"] / (high - low).max())
    axis = 2 * torch.arange(size, dtype=torch.float64) / size - 1
    points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).view(-1, 3)
    corners, faces = torch.from_numpy(scaled), torch.from_numpy(arrays["mc.faces"])
    distance = triangle_distances(points, corners[faces])
    signed = torch.where(winding_numbers(points, corners, faces) > 0.5, -distance, distance)
    shell = surface_shell(mesh, case.config["mc"]["octree_depth"], case.config["mc"]["scale"])
    return {
        "mc.scaled_vertices": scaled, "mc.sdf": signed.view(size, size, size).float().numpy(),
        "mc.out_vertices": np.asarray(shell.vertices).astype(np.float32), "mc.out_faces": np.asarray(shell.faces).astype(np.int32),
    }  # fmt: skip
