"""Runners of the evaluation cases: every metric against the tools that people quote."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genkit.data.winding import winding_numbers
from genkit.eval import inception_score as scores
from genkit.eval import kernels, manifold, shapes, similarity
from genkit.eval.distances import neighbour_radii
from genkit.eval.frechet import GaussianStatistics, frechet_distance
from genkit.eval.i3d import I3D, STAGES
from genkit.eval.inception import SIZE, InceptionV3
from genkit.eval.inception import STAGES as INCEPTION_STAGES
from genkit.eval.lpips import LPIPS, TRUNKS
from genkit.eval.reconstruction import ms_ssim_per_image, psnr_per_image, psnr_pooled, squared_errors, ssim_per_image
from genkit.eval.resize import resize
from genkit.eval.video import prepare_clips
from genkit.parity.base import Case, formula_tensor

Results = dict[str, Tensor]


def _value(x: Any) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float64)


def _statistics(features: Tensor) -> GaussianStatistics:
    stats = GaussianStatistics(features.shape[1])
    stats.update(features)
    return stats


# ---- inception ----


def _signed(x: Tensor) -> Tensor:
    return (x - 128) / 128


def _symmetric(x: Tensor) -> Tensor:
    return 2 * (x / 255) - 1


# Name in the case -> resize mode and normalisation of pixels in 0..255.
PATHS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "torch_fidelity": ("tf1", _signed),
    "pytorch_fid": ("bilinear", _symmetric),
    "clean": ("clean", _signed),
    "legacy_pytorch": ("bilinear", _symmetric),
    "legacy_tensorflow": ("nvidia", _signed),
    "torchmetrics_default": ("antialias", _signed),
}
VARIANTS = {
    "torch_fidelity": "tf1", "torch_fidelity_fast": "nvidia", "nvidia_jit": "nvidia", "pytorch_fid": "bilinear",
    "legacy_pytorch": "bilinear", "clean": "clean", "torchmetrics_antialias": "antialias", "pil_bilinear_quantized": "pil-bilinear",
}  # fmt: skip


def _conv_rule(key: str, z: Tensor) -> Tensor:
    """Return the formula weight of an Inception or I3D tensor."""
    if re.search(r"\.conv(3d)?\.weight$", key):
        fan = z[0].numel()
        return 2 * z / fan**0.5 if key.startswith("logits.") else z / fan**0.5
    if key.endswith("bn.weight"):
        return 1 + 0.1 * z
    if key.endswith("bn.bias"):
        return 0.2 * z
    return {"fc.weight": 0.08, "fc.bias": 0.5, "logits.conv3d.bias": 0.3}[key] * z


def _formula_weights(shapes_of: Mapping[str, Tensor], stored: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Return stored tensors and formula tensors for the rest."""
    keys = [key for key in shapes_of if not key.endswith("num_batches_tracked")]
    return {key: stored[key] if key in stored else _conv_rule(key, formula_tensor(prefix + key, shapes_of[key].shape)) for key in keys}


def inception(case: Case) -> Results:
    """Kind eval/inception: every resize and range variant, all taps, means of the stages."""
    weights = _formula_weights(InceptionV3.expected(), case.weights())
    network = InceptionV3(weights).to(case.device, case.dtype)
    results: Results = {}
    for name, picture in case.inputs.items():
        pixels = picture.permute(2, 0, 1)[None].to(case.dtype)
        for variant, mode in VARIANTS.items():
            resized = resize(pixels, SIZE, mode)
            resized = resized / 255 if variant == "pytorch_fid" else resized
            results[f"resize.{name}.{variant}.grid13"] = resized[0, :, ::13, ::13]
            results[f"resize.{name}.{variant}.sum_sumsq"] = torch.stack([resized.double().sum(), resized.double().square().sum()])
        for path, (mode, normalise) in PATHS.items():
            x = normalise(resize(pixels, SIZE, mode))
            if path == "torch_fidelity":
                results |= _stages(network, x, name)
                found = network(x, ("64", "192", "768", "2048", "logits", "logits_unbiased", "spatial"))
                results[f"{name}.adm.sfid_hwc7"] = found.pop("spatial")[0]
            else:
                found = network(x, ("64", "192", "768", "2048") if path == "pytorch_fid" else ("2048",))
            results |= {f"{name}.{path}.{tap}": value[0] for tap, value in found.items()}
    return results


def _stages(network: InceptionV3, x: Tensor, name: str) -> Results:
    """Return mean, deviation and channel means of every stage."""
    results: Results = {}

    def keep(stage: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: object, out: Tensor) -> None:
            values = out.double()
            results[f"{name}.stage.{stage}.mean_std"] = torch.stack([values.mean(), values.std(correction=0)]).float()
            results[f"{name}.stage.{stage}.chan_mean"] = values.mean((0, 2, 3)).float()

        return hook

    hooks = [network.get_submodule(stage).register_forward_hook(keep(stage)) for stage in INCEPTION_STAGES]
    network(x)
    for hook in hooks:
        hook.remove()
    return results


# ---- metrics on features ----


def metrics_small(case: Case) -> Results:
    """Kind eval/metrics_small: every feature metric in every tool's convention; parameters of a variant stand in its name."""
    data, config = case.inputs, case.config
    real, fake = data["real"], data["fake"]
    results = _small_frechet(case, real, fake) | _small_kid(case, real, fake) | _small_scores(case, data["logits"])
    for k in config["prdc_k"]:
        results |= {f"knn_radius.{name}.k{k}": neighbour_radii(data[name], k) for name in ("real", "fake")}
        results |= _manifold(f"prdc.k{k}", real, fake, k, border=False)
        batched = [f"prc_torch_fidelity_batched{size}" for (size,) in case.variants(r"^prc_torch_fidelity_batched(\d+)\.", [("64",)])]
        for tool in ("prc_torch_fidelity", "prc_adm", *batched):
            results |= _manifold(f"{tool}.k{k}", real, fake, k, border=True)
        results |= _manifold(f"ties.prdc_strict_less.k{k}", data["tie_real"], data["tie_fake"], k, border=False)
        for tool in ("less_equal", "torch_fidelity"):
            results |= _manifold(f"ties.{tool}.k{k}", data["tie_real"], data["tie_fake"], k, border=True)
    for (number,) in case.variants(r"^realism\.k(\d+)$", [("5",)]):
        results[f"realism.k{number}"] = manifold.realism(real, fake, int(number))
    value = _value(kernels.cmmd(real, fake, config["cmmd"]["sigma"], config["cmmd"]["scale"]))
    images, texts = data["clip_img"], data["clip_txt"]
    for (weight,) in case.variants(r"^clip\.clipscore_w([\d.]+)_per_pair$", [("2.5",)]):
        results[f"clip.clipscore_w{weight}_per_pair"] = similarity.clipscore_pairs(images, texts, float(weight))
    return results | {
        "authpct.dgm_eval": _value(100 * manifold.authenticity(real, fake)),
        "cmmd": value,
        "cmmd_f64": value,
        "vendi.fake.linear": _value(similarity.vendi_score(fake)),
        "mind.torch_fidelity": _value(
            similarity.sliced_distance(real, fake, config["mind"]["num_projections"], config["mind"]["rng_seed"])
        ),
        "sliced_w_approx.dgm_eval": _value(similarity.approximate_sliced_wasserstein(real, fake)),
        "clip.cosine": similarity.cosines(images, texts),
        "clip.mean_cosine": similarity.cosines(images, texts).mean(),
        "clip.score_x100_clamped_after_mean": _value(similarity.clip_score(images, texts)),
    }


def _small_frechet(case: Case, real: Tensor, fake: Tensor) -> Results:
    a, b = _statistics(real), _statistics(fake)
    distance, (mean_a, _), (mean_b, _) = frechet_distance(a, b), a.compute(), b.compute()
    tools = ("pytorch_fid", "clean_fid", "torch_fidelity", "torchmetrics", "dgm_eval_sqrtm", "dgm_eval_eigvals")
    results = {f"fid.{tool}": _value(distance) for tool in tools}
    for name, stats in (("real", a), ("fake", b)):
        results |= {f"mu.{name}": stats.compute()[0], f"sigma_ddof1.{name}": stats.compute()[1]}
    for (eps,) in case.variants(r"^mifid\.torchmetrics_eps([\d.]+)$", [(f"{eps:g}",) for eps in case.config["mifid_eps"]]):
        value = similarity.memorisation_informed_fid(distance, real, fake, float(eps), over_real=True)
        results[f"mifid.torchmetrics_eps{eps}"] = _value(value)
    return results | {
        "fid.stylegan_ddof0": _value(frechet_distance(a, b, ddof=0)),
        "fid.mean_term": (mean_a - mean_b).square().sum(),
        "mifid.mean_min_cosdist.over_fake(paper)": similarity.least_cosine_distances(fake, real).mean(),
        "mifid.mean_min_cosdist.over_real(torchmetrics)": similarity.least_cosine_distances(real, fake).mean(),
    }


def _small_kid(case: Case, real: Tensor, fake: Tensor) -> Results:
    config = case.config["kid"]
    subsets, size = config["subsets"], config["subset_size"]
    values = kernels.kid(real, fake, subsets, size, seed=config["rng_seed"])
    results = {
        "kid.per_subset": values,
        "kid.torch_fidelity.mean": values.mean(),
        "kid.torch_fidelity.std": values.std(correction=0),
        "kid.full_unbiased": _value(kernels.unbiased_mmd(fake, real)),
    }
    for (sigma,) in case.variants(r"^kid\.per_subset_rbf([\d.]+)$", [("10",)]):
        kernel = kernels.gaussian(float(sigma))
        results[f"kid.per_subset_rbf{sigma}"] = kernels.kid(real, fake, subsets, size, seed=config["rng_seed"], kernel=kernel)
    for tool, seed in case.variants(r"^kid\.(\w+)_seed(\d+)", [("clean_fid", "0"), ("dgm_eval", "0"), ("torchmetrics", "0")]):
        drawn = kernels.kid(real, fake, subsets, size, draws=tool.replace("_", "-"), seed=int(seed))
        name = f"kid.{tool}_seed{seed}"
        results |= {
            f"{name}.mean": drawn.mean(),
            f"{name}.std": drawn.std(correction=0),
            name: drawn if tool == "dgm_eval" else drawn.mean(),
        }
    return results


def _small_scores(case: Case, logits: Tensor) -> Results:
    splits, seed = case.config["isc"]["splits"], case.config["isc"]["rng_seed"]
    runs = {"torch_fidelity": scores.inception_score(logits, "torch-fidelity", splits=splits, seed=seed)}
    for (count,) in case.variants(r"^isc\.torch_fidelity_(\d+)split_noshuffle", [("7",)]):
        runs[f"torch_fidelity_{count}split_noshuffle"] = scores.inception_score(logits, "torch-fidelity", splits=int(count), shuffle=False)
    for (count,) in case.variants(r"^isc\.dgm_eval_(\d+)split", [("7",)]):
        runs[f"dgm_eval_{count}split"] = scores.inception_score(logits, "dgm-eval", splits=int(count), seed=seed)
    for (number,) in case.variants(r"^isc\.torchmetrics_seed(\d+)", [("0",)]):
        runs[f"torchmetrics_seed{number}"] = scores.inception_score(logits, "torchmetrics", splits=splits, seed=int(number))
    results = {f"isc.{name}.{part}": _value(getattr(score, part)) for name, score in runs.items() for part in ("mean", "std")}
    for (chunk,) in case.variants(r"^isc\.adm_split(\d+)$", [("100",), ("5000",)]):
        results[f"isc.adm_split{chunk}"] = _value(scores.inception_score(logits, "adm", chunk=int(chunk)).mean)
    return results | {"isc.titok_single_split": _value(scores.inception_score(logits, "titok").mean)}


def _manifold(prefix: str, real: Tensor, fake: Tensor, k: int, border: bool) -> Results:
    found = manifold.manifold_scores(real, fake, k, border=border)
    return {f"{prefix}.{name}": _value(getattr(found, name)) for name in ("precision", "recall", "density", "coverage")}


def metrics_2048(case: Case) -> Results:
    """Kind eval/metrics_2048: features by formula; Frechet distance with many and with few samples, KID, precision and recall.

    Sizes stand in the names: n500_m300 is the first 500 real and 300 generated rows.
    """
    config, counts = case.config, case.config["n"]
    real, fake = (_formula_features(config["formula"][side], counts[side]) for side in ("real", "fake"))
    whole = (str(counts["real"]), str(counts["fake"]))
    results: Results = {}
    for n, m in case.variants(r"^n(\d+)_m(\d+)\.(?:fid|mean_term|mu_head32|trace_sigma)", [whole, ("500", "500"), ("500", "300")]):
        results |= _moments(f"n{n}_m{m}", real[: int(n)], fake[: int(m)])
    kid = config["kid"]
    default = (*whole, str(kid["subsets"]), str(kid["subset_size"]))
    for n, m, subsets, size in case.variants(r"^n(\d+)_m(\d+)\.kid_(\d+)x(\d+)\.", [default]):
        values = kernels.kid(real[: int(n)], fake[: int(m)], int(subsets), int(size), seed=kid["rng_seed"])
        name = f"n{n}_m{m}.kid_{subsets}x{size}"
        results |= {f"{name}.mean": values.mean(), f"{name}.std": values.std(correction=0)}
    for n, m in case.variants(r"^n(\d+)_m(\d+)\.prc_torch_fidelity", [("2000", "1500")]):
        results |= _manifold(f"n{n}_m{m}.prc_torch_fidelity", real[: int(n)], fake[: int(m)], 3, border=True)
    for n, m, k in case.variants(r"^n(\d+)_m(\d+)\.prdc_k(\d+)", [("2000", "1500", "5")]):
        results |= _manifold(f"n{n}_m{m}.prdc_k{k}", real[: int(n)], fake[: int(m)], int(k), border=False)
    return results


def _moments(prefix: str, real: Tensor, fake: Tensor) -> Results:
    """Return distance and heads of the moments, real above fake."""
    a, b = _statistics(real), _statistics(fake)
    (mean_a, cov_a), (mean_b, cov_b) = a.compute(), b.compute()
    distance = _value(frechet_distance(a, b))
    return {f"{prefix}.fid.{tool}": distance for tool in ("exact_float64", "torch_fidelity", "pytorch_fid")} | {
        f"{prefix}.mean_term": (mean_a - mean_b).square().sum(),
        f"{prefix}.mu_head32": torch.stack([mean_a[:32], mean_b[:32]]),
        f"{prefix}.sigma_diag_head32": torch.stack([cov_a.diagonal()[:32], cov_b.diagonal()[:32]]),
        f"{prefix}.sigma_01_row": torch.stack([cov_a[0, :32], cov_b[0, :32]]),
        f"{prefix}.trace_sigma": torch.stack([cov_a.trace(), cov_b.trace()]),
    }


def _formula_features(side: Mapping[str, Any], count: int) -> Tensor:
    """Return relu((0.3 + shift) + scale * (Z s) + 0.05 scale (U V)), float32 [n, 2048]."""
    tag, scale, dim = side["tag"], np.float32(side["scale"]), 2048
    z, u = formula_tensor(f"eval/{tag}/Z", (count, dim)).numpy(), formula_tensor(f"eval/{tag}/U", (count, 32)).numpy()
    v = formula_tensor("eval/V", (32, dim)).numpy()
    spread = (0.5 * (1.0 + np.arange(dim)) ** -0.2).astype(np.float32)
    x = np.float32(0.3 + side["shift"]) + scale * (z * spread) + np.float32(0.05 * side["scale"]) * (u @ v)
    return torch.from_numpy(np.maximum(x, np.float32(0)))


# ---- reconstruction ----


def recon(case: Case) -> Results:
    """Kind eval/recon: PSNR, SSIM, MS-SSIM and LPIPS of 8-bit pairs."""
    originals, images = case.inputs["ref_u8"], case.inputs["rec_u8"]
    results: Results = {
        "mse.per_image": squared_errors(images, originals),
        "psnr.per_image": psnr_per_image(images, originals),
        "psnr.mean_of_images": psnr_per_image(images, originals).mean(),
        "psnr.of_pooled_mse": psnr_pooled(images, originals),
        "psnr.torchmetrics": psnr_pooled(images, originals),
        "ssim.skimage_uniform7": ssim_per_image(images, originals, "skimage"),
        "ssim.skimage_wang2004": ssim_per_image(images, originals, "wang"),
        "ssim.valid_gauss11_rgbmean": ssim_per_image(images, originals, "wang"),
        "ssim.valid_gauss11_luma601": ssim_per_image(images, originals, "wang-luma"),
        "ssim.torchmetrics_gauss11": ssim_per_image(images, originals, "torchmetrics"),
        "ssim.torchmetrics_uint8scale": ssim_per_image(images, originals, "torchmetrics"),  # the same: SSIM does not depend on the unit
    }
    for name, betas in case.config["msssim_betas"].items():
        results[name] = ms_ssim_per_image(images, originals, betas)
    x, y = (pixels.to(case.dtype) / 127.5 - 1 for pixels in (images, originals))
    stored = case.weights()
    for name, (build, _) in TRUNKS.items():
        own = {f"features.{key}": value for key, value in build()[0].state_dict().items()}
        trunk = {key: _trunk_rule(formula_tensor(f"lpips/{name}/{key}", value.shape)) for key, value in own.items()}
        heads = {key.removeprefix(f"{name}."): value for key, value in stored.items() if key.startswith(f"{name}.")}
        distance = LPIPS(name, trunk, heads).to(case.device, case.dtype)
        parts = distance.per_tap(x, y)
        results[f"lpips.{name}"] = parts.sum(0).double()
        results[f"lpips.{name}.per_layer"] = parts.T.double()
        results[f"lpips.{name}.spatial_mean_check"] = torch.stack([tap.abs().mean() for tap in distance.maps(y)]).double()
    return results


def _trunk_rule(z: Tensor) -> Tensor:
    return z * (2 / z[0].numel()) ** 0.5 if z.ndim == 4 else 0.05 * z


# ---- video ----


def fvd(case: Case) -> Results:
    """Kind eval/fvd: preparation of clips, I3D, Frechet distance on logits."""
    clips = case.inputs["videos_u8_bthwc"].permute(0, 1, 4, 2, 3)
    results: Results = {}
    prepared = {}
    for name, protocol in (("styleganv_torchscript", "stylegan-v"), ("videogpt", "videogpt"), ("cdfvd_squash", "cd-fvd")):
        x = prepared[name] = prepare_clips(clips, protocol)
        results[f"pre.{name}.shape"] = torch.tensor(x.shape)
        results[f"pre.{name}.sum_sumsq"] = torch.stack([x.double().sum(), x.double().square().sum()])
        results[f"pre.{name}.t0_grid7"] = x[:, :, 0, ::7, ::7]
    weights = _formula_weights(I3D.expected(case.config["num_classes"]), case.weights(), "i3d/")
    network = I3D(weights, case.config["num_classes"]).to(case.device, case.dtype)

    def keep(stage: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: object, out: Tensor) -> None:
            results[f"i3d.stage.{stage}.shape"] = torch.tensor(out.shape)
            results[f"i3d.stage.{stage}.chan_mean"] = out[0].mean((1, 2, 3))

        return hook

    hooks = [network.get_submodule(stage).register_forward_hook(keep(stage)) for stage in STAGES]
    results["i3d.logits"] = network(prepared["cdfvd_squash"].to(case.dtype))
    for hook in hooks:
        hook.remove()
    results["i3d.logits.from_styleganv_pre"] = network(prepared["styleganv_torchscript"].to(case.dtype))
    terms = case.config["frechet_features"]["terms"]
    a, b = (_statistics(_video_features(terms[side], terms["M"])) for side in ("real", "fake"))
    names = ("exact_float64_ddof1", "styleganv_port_ddof1", "videogpt_torch_svd_f64")
    results |= {f"fvd.{name}": _value(frechet_distance(a, b)) for name in names}
    return results | {"fvd.stylegan_v_original_ddof0": _value(frechet_distance(a, b, ddof=0))}


def _video_features(side: Mapping[str, Any], mix: Mapping[str, Any]) -> Tensor:
    """Return float32(latent @ M + noise + shift)."""

    def draw(term: Mapping[str, Any]) -> np.ndarray[Any, Any]:
        z: np.ndarray[Any, Any] = formula_tensor(term["seed"], term["shape"]).numpy()
        return z if term["scale"] == 1 else np.float32(term["scale"]) * z

    x = draw(side["latent"]) @ draw(mix) + draw(side["noise"]) + np.float32(side["shift"])
    return torch.from_numpy(x)


# ---- 3D ----


def mesh(case: Case) -> Results:
    """Kind eval/mesh: distances, normals, edges, occupancies and counts of two meshes."""
    data, config = case.inputs, case.config
    true, predicted = data["gt.points"], data["pred.points"]
    found = shapes.PointDistances.between(true, predicted)
    results: Results = {
        "completeness_l1": found.completeness.mean(),
        "accuracy_l1": found.accuracy.mean(),
        "hausdorff": _value(found.hausdorff()),
    }
    for power, name in ((1, "l1"), (2, "l2sq")):
        results[f"chamfer_{name}_sum"] = _value(found.chamfer(power))
        results[f"chamfer_{name}_half"] = _value(found.chamfer(power, half=True))
    results |= {f"chamfer_meshanything_v2_{name}": _value(found.chamfer()) for name in ("official", "float64")}
    for (threshold,) in case.variants(r"^fscore@([\d.]+)$", [("0.01",), ("0.02",), ("0.05",), ("0.1",)]):
        values = found.fscore(float(threshold))
        results |= {f"{name}@{threshold}": _value(value) for name, value in zip(("fscore", "precision", "recall"), values, strict=True)}
    normals = data["gt.normals"], data["pred.normals"]
    for name, signed in (("abs", False), ("signed", True)):
        results[f"normal_consistency_{name}"] = _value(shapes.normal_consistency(true, normals[0], predicted, normals[1], signed))
    results |= _edges(data, config) | _occupancy(data)
    counts = [shapes.mesh_counts(data[f"{side}.vertices"], data[f"{side}.faces"]) for side in ("gt", "pred")]
    return results | {
        "counts_v_f": torch.tensor([[c.vertices, c.faces] for c in counts]),
        "ratio_v_f": _value([counts[1].vertices / counts[0].vertices, counts[1].faces / counts[0].faces]),
        "area_volume": _value([[c.area, c.volume] for c in counts]),
        "watertight": torch.tensor([c.watertight for c in counts]),
    }


def _edges(data: Mapping[str, Tensor], config: Mapping[str, float]) -> Results:
    masks = {
        side: shapes.edge_points(data[f"{side}.points"], data[f"{side}.normals"], config["edge_radius"], config["edge_abs_cos_below"])
        for side in ("gt", "pred")
    }
    found = shapes.PointDistances.between(*(data[f"{side}.points"][masks[side]] for side in ("gt", "pred")))
    edges = {"ecd_l1_sum": _value(found.chamfer()), "ecd_l2sq_sum": _value(found.chamfer(2))}
    return edges | {f"edge_mask.{side}": mask for side, mask in masks.items()}


def _occupancy(data: Mapping[str, Tensor]) -> Results:
    def winding(queries: str, side: str) -> Tensor:
        return winding_numbers(data[queries], data[f"{side}.vertices"], data[f"{side}.faces"])

    volume, surface = ({side: winding(queries, side) for side in ("gt", "pred")} for queries in ("volume_queries", "surface_queries"))
    iou = {name: _value(shapes.occupancy_iou(w["gt"] > 0.5, w["pred"] > 0.5)) for name, w in (("v_iou", volume), ("s_iou", surface))}
    return iou | {f"winding.volume.{side}": value for side, value in volume.items()}
