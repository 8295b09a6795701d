"""EDM: the official pickles of Karras et al. 2022 (DDPM++, NCSN++, ADM, and the VP, VE and iDDPM baselines), and their state dicts.

A state dict tells the network by its keys and shapes, but neither preconditioner nor dropout: a pickle does, else give them. Rows of
attention are stored by head, channel, then q, k, v; ours are q, k, v in thirds. SiD's one-step generators have the same format.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genkit.checks import choose
from genkit.convert.base import ConversionReport, Drop, KeyTable, OfficialModel, Row, fill
from genkit.generators.edm import EDMUNet2DModel
from genkit.generators.edm_layers import Resample
from genkit.persistent_pickle import Persistent, read_persistent_pickle

COMPONENT, PIPELINE = "unet", "EDMPipeline"
PRECONDITIONERS = {"EDMPrecond": "edm", "VPPrecond": "vp", "VEPrecond": "ve", "iDDPMPrecond": "iddpm"}
UNETS = {"SongUNet": "song", "DhariwalUNet": "adm"}
_LICENCE, _SOURCE = "CC BY-NC-SA 4.0", "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained"
_NUMBERS = {
    "cifar10-32x32-uncond-vp": 55_733_891, "cifar10-32x32-cond-vp": 55_735_299, "cifar10-32x32-uncond-ve": 56_397_827,
    "cifar10-32x32-cond-ve": 56_400_643, "ffhq-64x64-uncond-vp": 61_805_571, "ffhq-64x64-uncond-ve": 62_761_091,
    "afhqv2-64x64-uncond-vp": 61_805_571, "afhqv2-64x64-uncond-ve": 62_761_091, "imagenet-64x64-cond-adm": 295_899_267,
}  # fmt: skip
OFFICIAL = tuple(
    OfficialModel(
        name=f"edm-{name}", source=_SOURCE, files=(f"edm-{name}.pkl",), licence=_LICENCE, parameters=count,
        memory_gb=round(4.4e-9 * count + 0.3, 1), note="non-commercial; read without executing what is in the pickle",
    )
    for name, count in _NUMBERS.items()
)  # fmt: skip
FILES = tuple(file for model in OFFICIAL for file in model.files)

# Constructor arguments of the official classes and their defaults, as far as they decide the network.
_SHARED = {"img_resolution": None, "img_channels": 3, "label_dim": 0, "augment_dim": 0}
_SONG = {
    "model_channels": 128, "channel_mult": [1, 2, 2, 2], "channel_mult_emb": 4, "num_blocks": 4, "attn_resolutions": [16], "dropout": 0.1,
    "embedding_type": "positional", "channel_mult_noise": 1, "encoder_type": "standard", "decoder_type": "standard",
    "resample_filter": [1, 1],
}  # fmt: skip
_ADM = {
    "model_channels": 192, "channel_mult": [1, 2, 3, 4], "channel_mult_emb": 4, "num_blocks": 3, "attn_resolutions": [32, 16, 8],
    "dropout": 0.1,
}  # fmt: skip
_IGNORED = ("use_fp16", "label_dropout", "sigma_min", "sigma_max", "M")  # of training, or of a preconditioner at its published value


def _thirds(rows: Tensor, heads: int) -> Tensor:
    """Order attention rows [heads * hd * 3, ...] as q, k, v in thirds."""
    return rows.unflatten(0, (heads, -1, 3)).movedim(2, 0).flatten(0, 2)


def _interleaved(rows: Tensor, heads: int) -> Tensor:
    """Undo `_thirds`."""
    return rows.unflatten(0, (3, heads, -1)).movedim(0, 2).flatten(0, 2)


def _table(is_adm: bool) -> KeyTable:
    """Return the table of a network: ADM has heads of 64 channels, SongUNet one head."""

    def heads(rows: Tensor) -> int:
        return len(rows) // 3 // 64 if is_adm else 1

    return KeyTable(
        "edm",
        [
            Drop("model.{rest}.resample_filter", "constants of the resampling, made from the configuration"),
            Drop("u", "noise levels of the iDDPM preconditioner, made by formula"),
            Row("model.{side}.{block}.qkv.{p}", "unet.{side}.{block}.qkv.{p}", lambda rows: _thirds(rows, heads(rows)),
                lambda rows: _interleaved(rows, heads(rows))),
            Row("model.map_noise.freqs", "unet.map_noise.freqs"),
            Row("model.{part}.{p}", "unet.{part}.{p}"),
            Row("model.{side}.{block}.{p}", "unet.{side}.{block}.{p}"),
            Row("model.{side}.{block}.{part}.{p}", "unet.{side}.{block}.{part}.{p}"),
        ],
    )  # fmt: skip


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Tell whether keys and shapes are those of an EDM network."""
    return {"model.map_layer0.weight", "model.map_layer1.weight"} <= shapes.keys() and any(
        re.fullmatch(r"model\.enc\.\d+x\d+_conv\.weight", key) for key in shapes
    )


def read(path: Path) -> tuple[dict[str, Tensor], str, dict[str, Any]] | None:
    """Read an official pickle.

    Returns:
        State dict, note on how it was read, and options of `from_official`; None for files of another format.

    Raises:
        ValueError: if the pickle names anything that such files do not hold; the name is given.
    """
    if path.suffix != ".pkl":
        return None
    content = read_persistent_pickle(path)
    network = content.get("ema") if isinstance(content, Mapping) else content
    if not isinstance(network, Persistent):
        raise ValueError(f"{str(path)!r} is a pickle without a network under 'ema'; expected an official EDM or SiD file.")
    arguments = dict(network.arguments)
    options = {"preconditioner": network.class_name, "network": {key: plain(value) for key, value in arguments.items()}}
    return network.tensors(), f"pickle read without executing it: a {network.class_name} under 'ema'", options


def plain(value: Any) -> Any:
    """Return tuples as lists and numbers of NumPy as Python's, as a configuration holds them."""
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value.item() if hasattr(value, "item") else value


def config_of(preconditioner: str, network: Mapping[str, Any]) -> dict[str, Any]:
    """Return our configuration of an official network.

    Args:
        preconditioner: official class ("EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond") or our name of it.
        network: arguments of its official constructor; what is left out takes the official default.

    Raises:
        ValueError: for unknown names and arguments.
    """
    name = PRECONDITIONERS.get(preconditioner, preconditioner)
    choose(name, PRECONDITIONERS.values(), "preconditioner")
    given = dict(network)
    default = "SongUNet" if name in ("vp", "ve") else "DhariwalUNet"
    model_type = given.pop("model_type", default)
    choose(model_type, UNETS, "model_type")
    own = _ADM if model_type == "DhariwalUNet" else _SONG
    conditioning: dict[str, Any] = {"name": name}
    conditioning |= {key: given.pop(key) for key in ("sigma_data", "beta_d", "beta_min", "epsilon_t") if key in given}
    unknown = sorted(given.keys() - own.keys() - _SHARED.keys() - set(_IGNORED))
    if unknown or given.get("img_resolution") is None:
        told = f"unknown: {', '.join(unknown)}" if unknown else "img_resolution is missing"
        raise ValueError(f"edm: arguments of {model_type} that genkit cannot follow ({told}).")
    return {
        "sample_size": given["img_resolution"],
        "in_channels": given.get("img_channels", 3),
        "label_dim": given.get("label_dim", 0),
        "augment_dim": given.get("augment_dim", 0),
        "unet_config": {"name": UNETS[model_type], **{key: plain(given.get(key, value)) for key, value in own.items()}},
        "preconditioner_config": conditioning,
    }


def network_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the official constructor arguments from keys and shapes; dropout is not among what they tell."""
    sides = sorted({int(match[1]) for key in state if (match := re.match(r"model\.enc\.(\d+)x\d+_", key))}, reverse=True)
    top, is_adm = sides[0], "model.out_conv.weight" in state
    embedding, noise = state["model.map_layer0.weight"].shape
    stem = state[f"model.enc.{top}x{top}_conv.weight"]
    channels = noise if is_adm else len(stem)
    network: dict[str, Any] = {
        "model_type": "DhariwalUNet" if is_adm else "SongUNet",
        "img_resolution": top,
        "img_channels": stem.shape[1],
        "model_channels": channels,
        "channel_mult": [len(state[f"model.enc.{r}x{r}_block0.conv1.weight"]) // channels for r in sides],
        "channel_mult_emb": embedding // channels,
        "num_blocks": sum(f"model.enc.{top}x{top}_block{i}.conv1.weight" in state for i in range(100)),
        "attn_resolutions": [r for r in sides if f"model.enc.{r}x{r}_block0.qkv.weight" in state],
    }
    for name in ("label", "augment"):
        if f"model.map_{name}.weight" in state:
            network[f"{name}_dim"] = state[f"model.map_{name}.weight"].shape[1]
    if not is_adm:
        network |= {
            "embedding_type": "fourier" if "model.map_noise.freqs" in state else "positional",
            "channel_mult_noise": noise // channels,
            "encoder_type": next((kind for kind in ("skip", "residual") if any(f"_aux_{kind}." in key for key in state)), "standard"),
            "decoder_type": "skip" if len(sides) > 1 and f"model.dec.{sides[-1]}x{sides[-1]}_aux_norm.weight" in state else "standard",
        }
        taps = next((value for key, value in state.items() if key.endswith(".resample_filter")), None)
        if taps is not None:
            line = taps.float().sum((0, 1, 2))
            network["resample_filter"] = [round(float(tap / line.min())) for tap in line]
    return network


def from_official(
    state: Mapping[str, Tensor], *, preconditioner: str = "EDMPrecond", network: Mapping[str, Any] | None = None
) -> tuple[EDMUNet2DModel, ConversionReport]:
    """Build the denoiser of an official state dict.

    Args:
        state: official tensors by key, `model.*`.
        preconditioner: official class or our name: a state dict does not tell it, a pickle does.
        network: arguments of the official constructor; read from keys and shapes if None.

    Returns:
        The model in fp32 eval mode and the report.

    Raises:
        ValueError: if keys, shapes or arguments do not fit.
    """
    if not recognise({key: tuple(value.shape) for key, value in state.items()}):
        raise ValueError("edm: this is no EDM network; expected keys model.map_layer0.weight, model.enc.32x32_conv.weight and so on.")
    model = EDMUNet2DModel(**config_of(preconditioner, network if network is not None else network_of(state)))
    table = _table(model.config["unet_config"]["name"] == "adm")
    ours, report = table.to_ours(state, model.state_dict())
    return fill(model, ours), report


def to_official(model: EDMUNet2DModel) -> dict[str, Tensor]:
    """Return the official state dict of a denoiser, constants included.

    Raises:
        ValueError: if it has what the official layout has no name for (patches).
    """
    if model.config["patch_size"] != 1:
        raise ValueError("edm: the official layout has no patches; this model has patch_size={}.".format(model.config["patch_size"]))
    official = _table(model.config["unet_config"]["name"] == "adm").to_official(model.state_dict())
    for name, module in model.unet.named_modules():
        if isinstance(module, Resample):
            official[f"model.{name.removesuffix('.resample')}.resample_filter"] = module.get_buffer("resample_filter")
    table = getattr(model.preconditioner, "table", None)
    return official if table is None else official | {"u": torch.as_tensor(table)}
