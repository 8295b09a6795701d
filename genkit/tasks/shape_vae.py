"""Train a shape VAE: surface points to latent tokens to a truncated signed distance.

loss = mean (logit - clamp(field / truncation, -1, 1))^2 + gamma KL

over points of the volume, near the surface and near sharp edges. With `only_head` the encoder and its bottleneck stay as they are, so that
generators of its latents stay valid, and the decoder side learns with another head.

Source: Hunyuan3D 2.0 (arXiv 2501.12202), whose truncation and gamma are not published; FlashVDM (arXiv 2503.16302) for the slim head.
Letters: b shapes, p points, n latent tokens, e width of a latent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from genkit.data.shape_samples import ShapeSamples
from genkit.tokenizers.shape_vae import ShapeVAE, VecsetPosterior
from genkit.training.optimizers import adamw_or_muon
from genkit.training.task import Phase, StepContext, Task

BLOCKS = ("blocks.", "encoder.cross.", "encoder.blocks.", "head.block.")
NUM_SAMPLES = 4
SLICE = 64  # side of the slices that sample grids show


@dataclass
class Config:
    """Settings of the task.

    Attributes:
        data: folder of prepared shapes, see `tokenizers/prepare_shapes.py`.
        model: of `ShapeVAE`.
        truncation: distance at which the field is 1, in units of a shape that spans 2; at least half the diagonal of a coarse cell.
        gamma: weight of the divergence.
        points: of each shape in a step, in thirds of volume, near and sharp.
        start: folder of a VAE whose weights the training starts from, as far as shapes agree; null starts anew.
        only_head: keep the encoder of `start` as it is.
        optimizer: "adamw", or "muon": Muon for the matrices of the blocks, AdamW for the rest.
        lr, betas, weight_decay: of the optimizer.
        export_dtype: floating type of the exported weights.
        seed: of the initial weights.
    """

    data: str = "shapes/train"
    model: dict[str, Any] = field(default_factory=dict)
    truncation: float = 0.05
    gamma: float = 1e-3
    points: int = 3072
    start: str | None = None
    only_head: bool = False
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 1e-2
    export_dtype: Literal["float32", "float16"] = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.truncation, self.lr) <= 0 or self.gamma < 0 or self.points < 3:
            got = f"truncation={self.truncation}, lr={self.lr}, gamma={self.gamma}, points={self.points}"
            raise ValueError(f"truncation and lr must be above 0, gamma at least 0 and points at least 3, got {got}.")
        if self.only_head and self.start is None:
            raise ValueError("only_head=true keeps the encoder of a trained model: give its folder as start.")


class ShapeVAETask(Task):
    """One optimizer, one network.

    Args:
        config: the settings.
        data: prepared shapes.

    Raises:
        ValueError: if the model takes more surface points than are prepared.
    """

    name = "shape_vae"
    ema = ("vae",)

    def __init__(self, config: Config, data: ShapeSamples) -> None:
        self.config, self.data = config, data
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = ShapeVAE(**{"num_encoder_layers": 2, **config.model})
        if model.config["pc_size"] > data.counts.surface or model.config["pc_sharpedge_size"] > data.counts.edges:
            wanted = f"{model.config['pc_size']} and {model.config['pc_sharpedge_size']}"
            raise ValueError(f"the model takes {wanted} surface points, prepared are {data.counts.surface} and {data.counts.edges}.")
        if config.start is not None:
            theirs, mine = ShapeVAE.from_pretrained(config.start).state_dict(), model.state_dict()
            model.load_state_dict(
                {key: theirs[key] if key in theirs and theirs[key].shape == mine[key].shape else mine[key] for key in mine}
            )
        if config.only_head:
            for part in (model.encoder, model.pre_kl):
                cast(nn.Module, part).requires_grad_(False)
        self.modules = {"vae": VAELoss(model, config.truncation)}

    def dataset(self) -> ShapeSamples:
        """Return the shapes."""
        return self.data

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return one optimizer over all trained parameters."""
        c, inner = self.config, tuple(f"model.{name}" for name in BLOCKS)
        settings: dict[str, Any] = {"lr": c.lr, "betas": c.betas, "weight_decay": c.weight_decay}
        return {"main": adamw_or_muon(self.modules["vae"], c.optimizer, inner, **settings)}

    def draw(self, batch: dict[str, Tensor], ctx: StepContext) -> dict[str, Tensor]:
        """Return surface rows and points of a step: of each kind some, drawn anew."""
        model, counts, b = self.vae.config, self.data.counts, len(batch["surface"])
        kinds = {"surface": (0, counts.surface, model["pc_size"]), "edges": (counts.surface, counts.edges, model["pc_sharpedge_size"])}
        rows = torch.cat([_some(ctx, name, b, *kind) for name, kind in kinds.items()], dim=1)
        third, offset, chosen = self.config.points // 3, 0, []
        for name in ("volume", "near", "sharp"):
            count = getattr(counts, name)
            if count:
                chosen.append(_some(ctx, name, b, offset, count, third))
            offset += count
        places = torch.cat(chosen, dim=1)
        return {
            "surface": batch["surface"].gather(1, rows[..., None].expand(-1, -1, batch["surface"].shape[-1])),
            "points": batch["points"].gather(1, places[..., None].expand(-1, -1, 3)),
            "field": batch["field"].gather(1, places),
        }

    @property
    def vae(self) -> ShapeVAE:
        """The network, unwrapped."""
        return cast(VAELoss, self.raw("vae")).model

    def step(self, batch: dict[str, Tensor], ctx: StepContext) -> Iterator[Phase]:
        """Compute the loss."""
        drawn, c = self.draw(batch, ctx), self.vae.config
        noise = ctx.randn("posterior", len(drawn["surface"]), c["num_latents"], c["embed_dim"])
        error, kl = self.modules["vae"](drawn["surface"], drawn["points"], drawn["field"], noise)
        yield Phase("main", error + self.config.gamma * kl, {"error": error.detach(), "kl": kl.detach()})

    @torch.no_grad()
    def sample(self, batch: dict[str, Tensor], ctx: StepContext) -> dict[str, Tensor]:
        """Return slices [m, 3, s, s] of the first shapes' fields, seen from the front, reconstructed: white inside, black outside."""
        model = cast(VAELoss, ctx.ema["vae"]).model
        drawn = self.draw({name: rows[:NUM_SAMPLES] for name, rows in batch.items()}, ctx)
        axis = torch.linspace(-1, 1, SLICE, device=ctx.device)
        y, x = torch.meshgrid(-axis, axis, indexing="ij")
        plane = torch.stack([x, y, torch.zeros_like(x)], -1).view(1, -1, 3).expand(len(drawn["surface"]), -1, -1)
        logits, _ = model(drawn["surface"], plane)
        return {"slices": logits.clamp(-1, 1).view(-1, 1, SLICE, SLICE).expand(-1, 3, -1, -1)}

    def export(self, modules: dict[str, nn.Module], out: Path) -> None:
        """Write the VAE."""
        model = cast(VAELoss, modules["vae"]).model
        (model.half() if self.config.export_dtype == "float16" else model).save_pretrained(out / "vae")


def _some(ctx: StepContext, name: str, b: int, first: int, count: int, wanted: int) -> Tensor:
    """Return places [b, wanted] among `count` from `first` on, without repetition where there are enough."""
    if wanted <= count:
        return first + ctx.rand(name, b, count).argsort(dim=1)[:, :wanted]
    return first + (ctx.rand(name, b, wanted) * count).long()


class VAELoss(nn.Module):
    """A VAE and its loss, as one module, so that several processes exchange gradients of what the loss uses.

    Args:
        model: the VAE.
        truncation: distance at which the field is 1.
    """

    def __init__(self, model: ShapeVAE, truncation: float) -> None:
        super().__init__()
        self.model, self.truncation = model, truncation

    def forward(self, surface: Tensor, points: Tensor, field: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the squared error and the divergence, scalars."""
        found: tuple[Tensor, VecsetPosterior] = self.model(surface, points, noise)
        logits, posterior = found
        target = (field / self.truncation).clamp(-1, 1)
        return (logits.float() - target).square().mean(), posterior.kl().float().mean()


def build(config: Config) -> ShapeVAETask:
    """Build the task of a recipe: open the prepared shapes."""
    return ShapeVAETask(config, ShapeSamples(config.data))
