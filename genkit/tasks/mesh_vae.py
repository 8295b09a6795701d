"""Train a mesh VAE with residual codes: faces to codes to faces, given points of the surface.

loss = cross-entropy of the nine coordinates of each face + commitment + codebook

In a second stage (`only_decoder`) encoder and codes stay as they are, and the decoder learns on codes drawn with Gumbel noise, so that it
mends the wrong codes of a generator.

Source: Chen et al. 2024 (MeshAnything, arXiv 2406.10163); its training code was never released.
Letters: b meshes, f faces, k bins.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkit.data.mesh_samples import MeshSamples
from genkit.tasks._mesh_data import MeshDraws, MeshItem, MeshTaskConfig, known_by, mesh_optimizer, open_encoder, open_meshes
from genkit.tokenizers.mesh_tokens import CanonicalMesh
from genkit.tokenizers.mesh_vae import MeshVQModel
from genkit.tokenizers.point_encoder import PointEncoder
from genkit.training.task import Phase, StepContext, Task


@dataclass
class Config(MeshTaskConfig):
    """Settings of the task, beside those of the data.

    Attributes:
        model: of `MeshVQModel`; widths and numbers that the others decide follow from them.
        start: folder of a mesh VAE to start from; null starts anew.
        only_decoder: keep encoder and codes of `start` as they are.
        noise: temperature of the Gumbel noise on codes; 0 takes the nearest.
    """

    model: dict[str, Any] = field(default_factory=dict)
    start: str | None = None
    only_decoder: bool = False
    noise: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise < 0:
            raise ValueError(f"noise must be at least 0, got {self.noise}.")
        if self.only_decoder and self.start is None:
            raise ValueError("only_decoder=true keeps the encoder of a trained model: give its folder as start.")


class MeshReconstruction(nn.Module):
    """Point encoder and mesh VAE as one module.

    Args:
        model: the mesh VAE.
        point_encoder: that learns along, or None.
        only_decoder: encoder and codes have no gradient.
    """

    def __init__(self, model: MeshVQModel, point_encoder: PointEncoder | None, only_decoder: bool) -> None:
        super().__init__()
        self.model, self.point_encoder, self.only_decoder = model, point_encoder, only_decoder

    def forward(self, features: Any, steps: Tensor, gumbel: Tensor | None, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits [b, f, 9, k], the quantizer's loss, and codes [b, 9 f], of faces [b, f, 3, 3], given points or their features."""
        found = features if self.point_encoder is None else self.point_encoder(features)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.only_decoder):
            out = self.model.encode(steps, gumbel, temperature)
        valid = (steps >= 0).flatten(2).all(-1)
        return self.model.decode_embedded(out.quantized, valid, found).logits, out.loss, out.indices


class MeshVAETask(Task):
    """One optimizer, one network.

    Args:
        config: the settings.
        samples: the meshes.
        point_encoder: trained, stays as it is; None: one learns along.

    Raises:
        ValueError: if the model holds fewer faces than the meshes have.
    """

    name = "mesh_vae"
    ema = ("model",)

    def __init__(self, config: Config, samples: MeshSamples, point_encoder: PointEncoder | None = None) -> None:
        self.config, self.samples = config, samples
        self.frozen = {} if point_encoder is None else {"point_encoder": point_encoder.eval().requires_grad_(False)}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            own = PointEncoder(**config.point_encoder) if point_encoder is None else None
            points = cast(PointEncoder, own or point_encoder).config
            sizes = {"point_width": points["width"], "num_points": points["num_latents"] + 1, "bins": config.bins}
            model = MeshVQModel(**{"encoder_depth": 6, "num_faces": config.bounds.max_faces, **config.model, **sizes})
        if config.start is not None:
            model.load_state_dict(MeshVQModel.from_pretrained(config.start).state_dict())
        self.most = model.config["num_faces"]
        if self.most < config.bounds.max_faces:
            raise ValueError(f"the model holds {self.most} faces, bounds.max_faces is {config.bounds.max_faces}.")
        if config.only_decoder:
            for part in (model.encoder, model.quantizer):
                cast(nn.Module, part).requires_grad_(False)
        if own is not None:
            for part in (own.pre_kl, own.post_kl, own.decoder_blocks):
                part.requires_grad_(False)  # the mesh decoder sees the encoder's tokens alone
        self.modules = {"model": MeshReconstruction(model, own, config.only_decoder)}
        self.draws = MeshDraws(config, samples, self._fits)

    def _fits(self, mesh: CanonicalMesh) -> bool:
        return len(mesh.faces) <= self.most

    def dataset(self) -> MeshSamples:
        """Return the meshes."""
        return self.samples

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return one optimizer over all trained parameters."""
        return {"main": mesh_optimizer(self.modules["model"], self.config, ("model.blocks.", "model.encoder.blocks."))}

    def step(self, batch: dict[str, Tensor], ctx: StepContext) -> Iterator[Phase]:
        """Compute the loss."""
        items = self.draws.items(batch, ctx)
        steps, features = stacked_faces(items, ctx.device), known_by(items, ctx.device, self.frozen)
        logits, quantizer_loss, _ = self.modules["model"](features, steps, self._gumbel(steps, ctx), self.config.noise or 1.0)
        present = (steps >= 0).flatten(2)
        flat, target = logits.flatten(0, 2).float(), steps.flatten(2).clamp_min(0).flatten()
        losses = F.cross_entropy(flat, target, reduction="none").view_as(present)
        reconstruction = (losses * present).sum() / present.sum()
        hits = ((logits.argmax(-1) == steps.flatten(2)) & present).sum() / present.sum()
        logs = {"reconstruction": reconstruction.detach(), "quantizer": quantizer_loss.detach(), "accuracy": hits.detach().float()}
        yield Phase("main", reconstruction + (0.0 if self.config.only_decoder else quantizer_loss), logs)

    def _gumbel(self, steps: Tensor, ctx: StepContext) -> Tensor | None:
        """Draw noise [3, b, 3 f, codes] where the settings want some."""
        if not self.config.noise:
            return None
        quantizer = cast(MeshReconstruction, self.raw("model")).model.quantizer
        b, f = steps.shape[:2]
        uniform = ctx.rand("gumbel", b, quantizer.num_levels, 3 * f, quantizer.codebook_size).transpose(0, 1)
        return -torch.log(-torch.log(uniform.clamp(1e-7, 1 - 1e-7)))

    def export(self, modules: dict[str, nn.Module], out: Path) -> None:
        """Write `out/vq_model` and `out/point_encoder`."""
        module = cast(MeshReconstruction, modules["model"])
        encoder = module.point_encoder if module.point_encoder is not None else self.frozen["point_encoder"]
        for name, part in (("vq_model", module.model), ("point_encoder", encoder)):
            kept = copy.deepcopy(part).half() if self.config.export_dtype == "float16" else part
            cast(Any, kept).save_pretrained(out / name)


def stacked_faces(items: list[MeshItem], device: torch.device) -> Tensor:
    """Return the coordinates [b, f, 3, 3] of meshes, -1 behind the last face of each."""
    faces = [torch.from_numpy(item.mesh.vertices[item.mesh.faces]) for item in items]
    return torch.nn.utils.rnn.pad_sequence(faces, batch_first=True, padding_value=-1).to(device)


def build(config: Config) -> MeshVAETask:
    """Build the task of a recipe: open meshes and encoder."""
    return MeshVAETask(config, open_meshes(config), open_encoder(config))
