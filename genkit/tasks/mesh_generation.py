"""Train a mesh transformer: the next token of a mesh, given points of its surface.

loss = mean over bos, tokens and eos of -log p(id | ids before, points)

The points are sampled from the quantised mesh itself. The point encoder is a trained one that stays as it is, or learns along.

Source: Chen et al. 2024 (MeshAnything, arXiv 2406.10163; V2, arXiv 2408.02555) and the released training code of V2.
Letters: b meshes, p points, t ids, k ids of the model.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkit.data.mesh_samples import MeshSamples
from genkit.generators.mesh_transformer import MeshTransformer
from genkit.pipelines.base import GenPipeline
from genkit.pipelines.meshanything import MeshAnythingPipeline
from genkit.tasks._mesh_data import MeshDraws, MeshItem, MeshTaskConfig, known_by, mesh_optimizer, open_encoder, open_meshes
from genkit.tokenizers.mesh_tokens import BOS, EOS, PAD, SPECIALS, CanonicalMesh
from genkit.tokenizers.mesh_vae import MeshVQModel
from genkit.tokenizers.point_encoder import PointEncoder
from genkit.training.task import Phase, StepContext, Task


@dataclass
class Config(MeshTaskConfig):
    """Settings of the task, beside those of the data.

    Attributes:
        vq_model: folder of a mesh VAE whose codes are the tokens; null for coordinates.
        max_token_ratio: most tokens of a mesh as a share of nine per face; 0.7 as published, null for any.
        model: of `MeshTransformer`; widths and numbers that the others decide follow from them.
        start: folder of a pipeline to start from; null starts anew.
        length_groups: a step sorts its meshes by faces and evaluates so many groups one after the other, each padded to its own longest:
            the same loss, less padding.
        gradient_checkpointing: trade time for memory.
    """

    vq_model: str | None = None
    max_token_ratio: float | None = None
    model: dict[str, Any] = field(default_factory=dict)
    start: str | None = None
    length_groups: int = 1
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length_groups < 1:
            raise ValueError(f"length_groups must be at least 1, got {self.length_groups}.")


def next_token_loss(logits: Tensor, ids: Tensor, score_first_pad: bool = False) -> Tensor:
    """Return the mean cross-entropy of ids [b, t] under logits [b, t, k], each of which predicts the id at its own place.

    Args:
        logits: [b, t, k]; the first is that of the last prefix position.
        ids: [b, t], bos first, pad behind eos.
        score_first_pad: the pad right behind an eos counts too, as in the released training code.
    """
    counts = ids != PAD
    if score_first_pad:
        counts = F.pad(counts[:, :-1], (1, 0), value=True)
    losses = F.cross_entropy(logits.float().flatten(0, 1), ids.flatten(), reduction="none").view_as(ids)
    return (losses * counts).sum() / (counts.sum() + 1e-8)


class MeshGenerationModel(nn.Module):
    """Point encoder and transformer as one module, so that several processes exchange gradients of both.

    Args:
        transformer: the network.
        point_encoder: that learns along, or None.
    """

    def __init__(self, transformer: MeshTransformer, point_encoder: PointEncoder | None) -> None:
        super().__init__()
        self.transformer, self.point_encoder = transformer, point_encoder

    def forward(self, features: Any, ids: Tensor) -> Tensor:
        """Return logits [b, t, k] of ids [b, t] at their own places, given points [b, p, 6] or their features."""
        found = features if self.point_encoder is None else self.point_encoder(features)
        prefix = self.transformer.prefix(found)
        logits: Tensor = self.transformer(ids[:, :-1], prefix).logits
        return logits[:, prefix.shape[1] - 1 :]


class MeshGenerationTask(Task):
    """One optimizer, one network.

    Args:
        config: the settings.
        samples: the meshes.
        point_encoder: trained, stays as it is; None: one learns along.
        vq_model: whose codes are the tokens, frozen, or None.

    Raises:
        ValueError: if the parts do not fit together.
    """

    name = "mesh_generation"
    ema = ("model",)
    find_unused_parameters = False

    def __init__(
        self, config: Config, samples: MeshSamples, point_encoder: PointEncoder | None = None, vq_model: MeshVQModel | None = None
    ) -> None:
        self.config, self.samples, self.vq_model = config, samples, vq_model
        frozen = {"point_encoder": point_encoder, "vq_model": vq_model}
        self.frozen = {name: part.eval().requires_grad_(False) for name, part in frozen.items() if part is not None}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            own = PointEncoder(**config.point_encoder) if point_encoder is None else None
            points = cast(PointEncoder, own or point_encoder).config
            sizes: dict[str, Any] = {"point_width": points["width"], "num_points": points["num_latents"] + 1, "bins": config.bins}
            if vq_model is not None:
                codes = vq_model.config["codebook_size"], vq_model.config["codebook_dim"]
                sizes |= {"layout": "faces", "num_codes": codes[0], "code_dim": codes[1], "bins": vq_model.config["bins"]}
            transformer = MeshTransformer(**{**config.model, **sizes})
        if vq_model is not None:
            transformer.codebook.data.copy_(vq_model.table.data)
        if config.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        self.most = transformer.config["max_tokens"]
        self.layout = transformer.tokens
        self.modules = {"model": MeshGenerationModel(transformer, own)}
        if config.start is not None:
            self._load(GenPipeline.from_pretrained(config.start))
        self.draws = MeshDraws(config, samples, self._fits)

    def _load(self, pipe: Any) -> None:
        """Start from the weights of a pipeline."""
        model = cast(MeshGenerationModel, self.modules["model"])
        model.transformer.load_state_dict(pipe.transformer.state_dict())
        if model.point_encoder is not None:
            model.point_encoder.load_state_dict(pipe.point_encoder.state_dict())

    def _fits(self, mesh: CanonicalMesh) -> bool:
        """Tell whether a mesh is no longer than the model's sequences."""
        if self.vq_model is not None:
            return 9 * len(mesh.faces) + 2 <= self.most and len(mesh.faces) <= self.vq_model.config["num_faces"]
        tokens, ratio = len(self.layout.encode(mesh)), self.config.max_token_ratio
        return tokens + 2 <= self.most and (ratio is None or tokens < ratio * 9 * len(mesh.faces))

    def dataset(self) -> MeshSamples:
        """Return the meshes."""
        return self.samples

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return one optimizer over all trained parameters."""
        return {"main": mesh_optimizer(self.modules["model"], self.config, ("transformer.blocks.",))}

    def ids(self, items: list[MeshItem], device: torch.device) -> Tensor:
        """Return the ids [b, t] of meshes: bos, tokens, eos, pad."""
        if self.vq_model is None:
            rows = [self.layout.encode(item.mesh) for item in items]
        else:
            rows = [self._codes(item, device) for item in items]
        ids = torch.full((len(rows), max(map(len, rows)) + 2), PAD)
        ids[:, 0] = BOS
        for i, row in enumerate(rows):
            ids[i, 1 : len(row) + 1] = torch.from_numpy(np.asarray(row)) + SPECIALS
            ids[i, len(row) + 1] = EOS
        return ids.to(device)

    @torch.no_grad()
    def _codes(self, item: MeshItem, device: torch.device) -> np.ndarray:
        """Return the codes [9 f] of a mesh."""
        steps = torch.from_numpy(item.mesh.vertices[item.mesh.faces])[None].to(device)
        return cast(MeshVQModel, self.vq_model).encode(steps).indices[0].cpu().numpy()

    def step(self, batch: dict[str, Tensor], ctx: StepContext) -> Iterator[Phase]:
        """Compute the loss."""
        items = sorted(self.draws.items(batch, ctx), key=lambda item: len(item.mesh.faces))
        size = math.ceil(len(items) / self.config.length_groups)
        losses, hits, counts = [], [], []
        for first in range(0, len(items), size):
            part = items[first : first + size]
            ids = self.ids(part, ctx.device)
            logits = self.modules["model"](known_by(part, ctx.device, self.frozen), ids)
            losses.append(next_token_loss(logits, ids))
            hits.append(((logits.detach().argmax(-1) == ids) & (ids != PAD)).sum())
            counts.append((ids != PAD).sum())
        count = torch.stack(counts)
        loss = (torch.stack(losses) * count).sum() / count.sum()
        yield Phase("main", loss, {"accuracy": torch.stack(hits).sum() / count.sum(), "length": count.sum() / len(items)})

    # ---- what comes out ----

    def pipeline(self, module: nn.Module) -> MeshAnythingPipeline:
        """Return the pipeline around trained networks."""
        model = cast(MeshGenerationModel, module)
        encoder = model.point_encoder if model.point_encoder is not None else self.frozen["point_encoder"]
        most = self.config.bounds.max_faces
        return MeshAnythingPipeline(
            model.transformer, cast(PointEncoder, encoder), self.vq_model, num_points=self.config.num_points, max_faces=most
        )

    def export(self, modules: dict[str, nn.Module], out: Path) -> None:
        """Write the pipeline."""
        pipe = self.pipeline(modules["model"])
        if self.config.export_dtype == "float16":
            halves = {name: copy.deepcopy(part).half() for name, part in pipe.components.items() if isinstance(part, nn.Module)}
            pipe.register_modules(**halves)
        pipe.save_pretrained(out)


def build(config: Config) -> MeshGenerationTask:
    """Build the task of a recipe: open meshes, encoder and mesh VAE."""
    vq_model = cast(MeshVQModel, MeshVQModel.from_pretrained(config.vq_model)) if config.vq_model is not None else None
    return MeshGenerationTask(config, open_meshes(config), open_encoder(config), vq_model)
