"""Runners of the FlashVDM golden cases."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from genkit.convert import flashvdm
from genkit.data.surfaces import points_on_edges, sharp_edges, smallest_cosines
from genkit.parity._flashvdm_dit import conditioner, distill_reference, dit, schedulers
from genkit.parity.base import Case, with_gradients
from genkit.tokenizers.adaptive_kv import CellQuery, FlashDecoder
from genkit.tokenizers.isosurface import lewiner
from genkit.tokenizers.point_sampling import farthest_points
from genkit.tokenizers.shape_vae import ShapeVAE
from genkit.tokenizers.volume_decoders import NEAR, DenseDecoder, HierarchicalDecoder, ShapeQuery, level_resolutions
from genkit.tokenizers.volume_grid import SparseField, coordinates, sign_changes
from genkit.weights import read_safetensors

__all__ = ["conditioner", "distill_reference", "dit", "schedulers", "sharp_edge_sampling", "vae_encode_decode", "volume_decode"]


def _build(case: Case) -> ShapeVAE:
    """Build the VAE through the converter."""
    config = case.config["vae"]
    names = ("heads", "num_latents", "scale_factor", "include_pi", "pc_size", "pc_sharpedge_size", "downsample_ratio")
    model, _ = flashvdm.from_official(case.weights(), **{name: config[name] for name in names if name in config})
    return model.to(case.device)


def vae_encode_decode(case: Case) -> dict[str, Tensor]:
    """Kind flashvdm/vae_encode_decode: farthest points, encoder, bottleneck, decoder, head, gradients."""
    inputs, vae = case.inputs, _build(case).requires_grad_(True)
    config, surface = vae.config, inputs["surface"]
    permutations, starts = (inputs["perm0"], inputs["perm1"]), (inputs["fps0.start"], inputs["fps1.start"])
    data, queries = vae.choose_points(surface, permutations, starts)
    results: dict[str, Tensor] = {"input_pc": data[..., :3], "query_pc": queries[..., :3]}
    for name, points in (("query_embed", queries), ("data_embed", data)):
        results[name] = torch.cat([vae.embed(points[..., :3]), points[..., 3:]], dim=-1)
    for i, part in enumerate(surface.split([config["pc_size"], config["pc_sharpedge_size"]], dim=1)):
        kept = part[:, permutations[i]][:, : vae.counts[i] * config["downsample_ratio"]]
        index = farthest_points(kept[..., :3], vae.counts[i], starts[i])
        results[f"fps{i}.idx_flat"] = (index + torch.arange(len(kept))[:, None] * kept.shape[1]).flatten()
        results[f"fps{i}.ratio"] = torch.tensor([vae.counts[i] / kept.shape[1]])
    raw: dict[str, Tensor] = {}
    assert vae.encoder is not None
    assert vae.pre_kl is not None
    watched: dict[str, Any] = {"enc.cross_attn": vae.encoder.cross, "enc.ln_post": vae.encoder.ln_post, "moments": vae.pre_kl}
    watched |= {f"enc.resblock.{i}": block for i, block in enumerate(vae.encoder.blocks)}
    hooks = [
        module.register_forward_hook(lambda module, args, output, name=name: raw.__setitem__(name, output))
        for name, module in watched.items()
    ]
    posterior = vae.encode(surface, permutations, starts)
    for hook in hooks:
        hook.remove()
    sample = posterior.sample(inputs["posterior_noise"])
    decoded = vae.decode(sample)
    logits = vae.query(inputs["queries"], decoded)[..., None]
    loss = F.mse_loss(logits, inputs["target"]) + 1e-3 * posterior.kl().mean()
    loss.backward()
    results |= raw | {
        "encoder_out": raw["enc.ln_post"],
        "mean": posterior.mean,
        "logvar_clamped": posterior.log_variance,
        "std": posterior.std,
        "z_mode": posterior.mean,
        "z_sample": sample,
        "kl_mean": posterior.kl(),
        "decoded": decoded,
        "query_logits": logits,
        "standin_loss": loss,
    }
    shadow = flashvdm.to_official(with_gradients(vae))
    results |= {f"grad.{key}": value for key, value in shadow.items()}
    return {name: value for name, value in results.items() if not case.output_names or name in case.output_names}


def volume_decode(case: Case) -> dict[str, Tensor]:
    """Kind flashvdm/volume_decode: decoder, head, dense, hierarchical and adaptive decoding, mesh statistics."""
    config, vae, latents = case.config, _build(case), case.inputs["latents"]
    raw: dict[str, Tensor] = {}
    watched: dict[str, Any] = {"post_kl": vae.post_kl, "query_emb": vae.head.query_proj}
    watched |= {f"resblock.{i}": block for i, block in enumerate(vae.blocks)}
    hooks = [
        module.register_forward_hook(lambda module, args, output, name=name: raw.__setitem__(name, output))
        for name, module in watched.items()
    ]
    with torch.no_grad():
        tokens = vae.decode(latents)
        logits = vae.query(case.inputs["queries"], tokens)[..., None]
    for hook in hooks:
        hook.remove()
    results = {**raw, "decoded_latents": tokens, "fourier": vae.embed(case.inputs["queries"]), "query_logits": logits}
    resolution, least = config["octree_resolution"], config["min_resolution"]
    common = {"num_chunks": config["num_chunks"], "bound": config["bounds"], "closed": False}
    dense = DenseDecoder(**common)(vae, tokens[0], resolution)
    results["vanilla_grid"] = dense.dense()
    results |= {f"vanilla.{name}": value for name, value in _mesh(dense, resolution, config["mc_level"]).items()}
    trace: list[dict[str, Any]] = []
    hierarchical = HierarchicalDecoder(rule="band", min_resolution=least, **common)(vae, tokens[0], resolution, trace)
    results |= {f"hier.{name}": value for name, value in _levels(hierarchical, trace).items()}
    results |= _published_defect(case, vae, tokens[0])
    for selection in ("mean", "merge"):
        trace = []
        decoder = FlashDecoder(selection=selection, order="torch", min_resolution=least, **common)
        found, name = decoder(vae, tokens[0], resolution, trace), f"flash_{selection}"
        results |= {f"{name}.{key}": value for key, value in (_levels(found, trace) | _choices(trace)).items()}
        results |= {f"{name}.{key}": value for key, value in _mesh(found, resolution, config["mc_level"]).items()}
        results |= {f"{name}.level0.topk_gap": _gap(vae, tokens[0], decoder, resolution)}
    return {name: value for name, value in results.items() if not case.output_names or name in case.output_names}


def _packed(keys: Tensor, total: int) -> Tensor:
    """Return which of `total` places are keys, as bits."""
    mask = np.zeros(total, bool)
    mask[keys.numpy()] = True
    return torch.from_numpy(np.packbits(mask))


def _levels(field: SparseField, trace: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Return the points and values of the last level, the coarse grid, and the sign changes of the others."""
    assert field.keys is not None
    found = {"mask_packed": _packed(field.keys, field.side**3), "values": field.values}
    levels = [entry for entry in trace if "values" in entry]
    for i, entry in enumerate(levels[:-1]):
        side = entry["resolution"] + 1
        keys = torch.arange(side**3) if entry["keys"] is None else entry["keys"]
        found[f"level{i}.shape"] = torch.tensor([side] * 3)
        found[f"level{i}.signchange_mask_packed"] = _packed(keys[sign_changes(entry["keys"], entry["values"], side)], side**3)
        if entry["keys"] is None:
            found[f"level{i}.grid"] = entry["values"].view(side, side, side)
    return found


def _choices(trace: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Return the tokens kept by the cells of the coarse grid, and those of all finer levels."""
    coarse, *fine = [entry for entry in trace if "kept" in entry]
    heads, tokens = coarse["kept"].shape[1:]
    kept = torch.cat([entry["kept"] for entry in fine])
    return {
        "level0.topk_indices": coarse["kept"].nonzero()[:, 2].view(-1, heads, int(coarse["kept"][0, 0].sum())).to(torch.int16),
        "fine.cell_counts": torch.cat([entry["counts"] for entry in fine]).int(),
        "fine.kept_packed": torch.from_numpy(np.packbits(kept.numpy())),
        "fine.kept_shape": torch.tensor([len(kept), heads, tokens]),
        "fine.n_kept": kept[:, 0].sum(-1).to(torch.int16),
    }


def _gap(vae: ShapeVAE, tokens: Tensor, decoder: FlashDecoder, resolution: int) -> Tensor:
    """Return how far the last kept token's score is above the next one's, per coarse cell and head."""
    coarse = decoder.levels(resolution)[0]
    query = CellQuery(vae, tokens, decoder, coarse, None)
    points = coordinates(torch.arange((coarse + 1) ** 3), coarse, decoder.bound)
    cells = query.coarse_cells()
    gaps = []
    for cell in range(int(cells.max()) + 1):
        _, q = vae.head.queries(query.embed(points[cells == cell]))
        scores = torch.einsum("hkd,hnd->hn", q[0, :, ::100], query.keys[0]) / q[0, :, ::100].shape[1]
        top = scores.topk(query.count + 1, dim=-1).values
        gaps.append(top[:, -2] - top[:, -1])
    return torch.stack(gaps).detach()


def _mesh(field: SparseField, resolution: int, level: float) -> dict[str, Tensor]:
    """Return statistics of the mesh at the published scale, of all vertices and of what remains without unknown ones."""
    import trimesh

    vertices, faces = lewiner(field.dense().numpy(), level)
    placed = vertices / (resolution + 1) * (2 * field.bound) - field.bound
    known: Any = np.isfinite(placed).all(1)
    faces = faces[known[faces].all(1)][:, ::-1]
    mesh = trimesh.Trimesh(np.where(known[:, None], placed, 0), faces, process=False)
    return {
        "mesh_counts": torch.tensor([len(vertices), len(lewiner(field.dense().numpy(), level)[1])]),
        "mesh_nan_verts": torch.tensor([int((~known).sum())]),
        "mesh_bbox": torch.from_numpy(np.stack([placed[known].min(0), placed[known].max(0)])).float(),
        "mesh_v_mean": torch.from_numpy(placed[known].mean(0)).float(),
        "mesh_area_volume": torch.tensor([mesh.area, mesh.volume], dtype=torch.float64),
    }


def _published_defect(case: Case, vae: ShapeVAE, tokens: Tensor) -> dict[str, Tensor]:
    """Return what the released hierarchical decoder gives, whose fine points all collapse to the corner (-1, -1, -1)."""
    config = case.config
    resolution, query = config["octree_resolution"], ShapeQuery(vae, tokens, config["num_chunks"])
    corner = query(torch.full((1, 3), -1.0))
    levels = level_resolutions(resolution, config["min_resolution"])
    nothing_left = not bool((corner.abs() < NEAR).any())
    return {
        "hier.official_raises": torch.tensor([len(levels) > 2 and nothing_left]),
        "hier.official_two_level_n_distinct": torch.tensor([len(corner.unique())]),
        "hier.official_two_level_first": corner,
    }


def sharp_edge_sampling(case: Case) -> dict[str, Tensor]:
    """Kind flashvdm/sharp_edge_sampling: sharp vertices and points on sharp edges, float64 whatever the case's type."""
    inputs = {name: value.numpy() for name, value in read_safetensors(case.dir / "inputs.safetensors").items()}
    faces, normals = inputs["faces"], inputs["vertex_normals"]
    cosines = smallest_cosines(normals, inputs["face_normals"], faces, official=True)
    is_sharp = cosines < case.config["threshold"]
    points, interpolated = points_on_edges(inputs["vertices"], normals, sharp_edges(faces, is_sharp), inputs["u_edge"], inputs["w"])
    found = {"min_dot": cosines, "sharp_vertex": is_sharp, "points": points, "normals": interpolated}
    return {name: torch.from_numpy(value) for name, value in found.items()}
