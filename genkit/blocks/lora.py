"""LoRA: trained low-rank changes of frozen linear maps, kept in peft's file layout.

Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022, arXiv 2106.09685. Files are those of peft
(`adapter_model.safetensors`, `adapter_config.json`), which opens them for models whose layers have the same names.
Letters: i inputs, o outputs of a layer, r rank.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from genkit.blocks.around_linear import AroundLinear, put_module
from genkit.checks import shorten
from genkit.weights import read_safetensors

M = TypeVar("M", bound=nn.Module)
TARGETS = ("q", "kv", "context_kv", "proj")
"""Last parts of the names of attention's linear maps."""
OTHER_KINDS = ("use_dora", "use_rslora", "alpha_pattern", "fan_in_fan_out")
"""Settings of peft under which the files mean another change."""
WEIGHTS, CONFIG, PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."


class LoRA(AroundLinear):
    """base(x) + alpha / r * lora_B(lora_A(x)), the base at the start.

    Args:
        base: frozen linear map.
        rank: r.
        alpha: factor; r if None, so that the change has factor 1.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float | None = None) -> None:
        super().__init__(base.requires_grad_(False))
        if not 1 <= rank <= min(base.in_features, base.out_features):
            limit = min(base.in_features, base.out_features)
            raise ValueError(f"LoRA: rank must lie in 1 .. {limit} for a layer {base.in_features} -> {base.out_features}, got {rank}.")
        self.rank, self.alpha = rank, float(rank if alpha is None else alpha)
        like = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, **like)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, **like)
        nn.init.zeros_(self.lora_B.weight)

    @property
    def weight(self) -> Tensor:
        """The changed weight [o, i]."""
        return self.base.weight + self.change().to(self.base.weight.dtype)

    def change(self) -> Tensor:
        """Return what is added to the weight [o, i], float32."""
        return low_rank(self.lora_A.weight, self.lora_B.weight, self.alpha)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., i] to [..., o]."""
        out: Tensor = self.base(x) + self.alpha / self.rank * self.lora_B(self.lora_A(x))
        return out


def low_rank(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """Return alpha / r * B A [o, i] float32 of A [r, i] and B [o, r]."""
    return alpha / len(a) * (b.float() @ a.float())


def add_lora(model: nn.Module, rank: int, alpha: float | None = None, targets: Sequence[str] = TARGETS) -> list[nn.Parameter]:
    """Freeze a model and put LoRA around its linear maps of certain names.

    Args:
        model: any.
        rank, alpha: see `LoRA`.
        targets: last parts of the layers' names.

    Returns:
        The parameters to train.

    Raises:
        ValueError: if no linear map has such a name, or the model has LoRA already.
    """
    if any(isinstance(part, LoRA) for part in model.modules()):
        raise ValueError(f"add_lora: {type(model).__name__} has LoRA already; merge it first.")
    chosen = [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and name.rpartition(".")[2] in targets]
    if not chosen:
        known = sorted({name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, nn.Linear)})
        raise ValueError(f"add_lora: {type(model).__name__} has no linear maps named {list(targets)}; it has {known}.")
    model.requires_grad_(False)
    trained: list[nn.Parameter] = []
    for name in chosen:
        layer = LoRA(model.get_submodule(name), rank, alpha)  # type: ignore[arg-type]
        put_module(model, name, layer)
        trained += [*layer.lora_A.parameters(), *layer.lora_B.parameters()]
    return trained


def merged(model: M) -> M:
    """Return a copy of a model in which every LoRA has become a plain linear map with the changed weight."""
    found = copy.deepcopy(model)
    for name, part in list(found.named_modules()):
        if isinstance(part, LoRA):
            weight = part.base.weight.float() + part.change()
            part.base.weight = nn.Parameter(weight.to(part.base.weight.dtype), requires_grad=False)
            put_module(found, name, part.base)
    return found


@dataclass(frozen=True)
class LoRAWeights:
    """A stored LoRA.

    Args:
        pairs: name of the layer -> A [r, i] and B [o, r].
        alpha: factor.
        base_model: what it was trained on, as a person names it; "" if unknown.
    """

    pairs: dict[str, tuple[Tensor, Tensor]]
    alpha: float
    base_model: str = ""

    @classmethod
    def of(cls, model: nn.Module, base_model: str = "") -> LoRAWeights:
        """Take the LoRA of a model.

        Raises:
            ValueError: if it has none.
        """
        parts = {name: part for name, part in model.named_modules() if isinstance(part, LoRA)}
        if not parts:
            raise ValueError(f"{type(model).__name__} has no LoRA.")
        pairs = {name: (part.lora_A.weight.detach().clone(), part.lora_B.weight.detach().clone()) for name, part in parts.items()}
        return cls(pairs, next(iter(parts.values())).alpha, base_model)

    def save(self, folder: str | Path) -> None:
        """Write peft's two files into a folder, made if needed."""
        from safetensors.torch import save_file

        out = Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{PREFIX}{name}.lora_{c}.weight": part.contiguous()
            for name, pair in self.pairs.items()
            for c, part in zip("AB", pair, strict=True)
        }
        save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
        ranks = {len(a) for a, _ in self.pairs.values()}
        config = {
            "peft_type": "LORA", "r": max(ranks), "lora_alpha": self.alpha, "bias": "none", "base_model_name_or_path": self.base_model,
            "target_modules": sorted(self.pairs),
        }  # fmt: skip
        (out / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> LoRAWeights:
        """Read a folder.

        Raises:
            FileNotFoundError: if a file is not there. ValueError: for files that hold something else than plain LoRA.
        """
        path = Path(folder).expanduser()
        missing = [name for name in (WEIGHTS, CONFIG) if not (path / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{str(folder)!r} is no LoRA: it lacks {', '.join(missing)}.")
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        state: Mapping[str, Tensor] = read_safetensors(path / WEIGHTS)
        names = sorted({key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in state})
        wanted = {f"{PREFIX}{name}.lora_{c}.weight" for name in names for c in "AB"}
        other = [name for name in OTHER_KINDS if config.get(name)]
        if other:
            raise ValueError(f"{str(folder)!r} is a LoRA of another kind ({', '.join(other)}), whose change is not alpha / r B A.")
        if config.get("peft_type") != "LORA" or wanted != set(state) or not names:
            raise ValueError(f"{str(folder)!r} holds no plain LoRA: keys such as {shorten(sorted(set(state) ^ wanted) or sorted(state))}.")
        pairs = {name: (state[f"{PREFIX}{name}.lora_A.weight"], state[f"{PREFIX}{name}.lora_B.weight"]) for name in names}
        return cls(pairs, float(config.get("lora_alpha", config.get("r", 1))), str(config.get("base_model_name_or_path") or ""))

    @torch.no_grad()
    def apply(self, model: nn.Module, scale: float = 1.0) -> None:
        """Add scale times the change to the weights of a model, in place.

        Raises:
            ValueError: for layers that the model lacks or whose sizes differ; then nothing is changed.
        """
        layers = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
        lacking = [name for name in self.pairs if name not in layers]
        if lacking:
            source = f"; it was trained on {self.base_model}" if self.base_model else ""
            raise ValueError(f"this LoRA is for layers that {type(model).__name__} lacks: {shorten(lacking)}{source}.")
        for name, (a, b) in self.pairs.items():
            if layers[name].weight.shape != (len(b), a.shape[1]):
                raise ValueError(f"this LoRA changes {name} [{len(b)}, {a.shape[1]}], the model's is {list(layers[name].weight.shape)}.")
        for name, (a, b) in self.pairs.items():
            weight = layers[name].weight
            weight.copy_(weight.float() + scale * low_rank(a, b, self.alpha).to(weight.device))
