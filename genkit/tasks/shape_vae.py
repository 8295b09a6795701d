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
from genkit.pipelines.shape_reconstruction import ShapeReconstructionPipeline
from genkit.tasks._solid_metrics import RESOLUTION as SOLID_RESOLUTION
from genkit.tasks._solid_metrics import check_solid_metrics, solid_metrics
from genkit.tokenizers.shape_vae import ShapeVAE, VecsetPosterior
from genkit.training.evaluation import EvaluationConfig
from genkit.training.optimizers import adamw_or_muon
from genkit.training.task import Phase, StepContext, Task

BLOCKS = ("blocks.", "encoder.cross.", "encoder.blocks.", "head.block.")
NUM_SAMPLES = 4
SLICE = 64  # side of the slices that sample grids show
RESOLUTION = 128  # of the pipeline
SCALED = 256  # shapes whose latents are measured


@dataclass
class Config:
    """Settings of the task.

    Attributes:
        data: folder of prepared shapes, see `tokenizers/prepare_shapes.py`.
        model: of `ShapeVAE`.
        truncation: distance at which the field is 1, in units of a shape that spans 2; at least half the diagonal of a coarse cell.
        gamma: weight of the divergence.
        points: of each shape in a step, in thirds of volume, near and sharp.
        augment: turn every shape of a step by a quarter, a half, three quarters or not at all about y, and mirror half of them.
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
    augment: bool = False
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
        surface = batch["surface"].gather(1, rows[..., None].expand(-1, -1, batch["surface"].shape[-1]))
        points = batch["points"].gather(1, places[..., None].expand(-1, -1, 3))
        if self.config.augment:
            turn = symmetries(ctx.rand("turn", b))
            positions, normals, rest = surface[..., :3], surface[..., 3:6], surface[..., 6:]
            surface, points = torch.cat([positions @ turn, normals @ turn, rest], dim=-1), points @ turn
        return {"surface": surface, "points": points, "field": batch["field"].gather(1, places)}

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

    def check_evaluation(self, config: EvaluationConfig) -> None:
        """Refuse metrics that shapes do not have."""
        check_solid_metrics(config)

    def evaluate(self, config: EvaluationConfig, ctx: StepContext) -> dict[str, float]:
        """Reconstruct meshes with the averaged weights, by the head that learns."""
        pipe = self.pipeline(cast(VAELoss, ctx.ema["vae"]).model).to(ctx.device)
        pipe.set_progress_bar_config(disable=True)
        options = {"octree_resolution": config.size or SOLID_RESOLUTION, "head": "slim" if self.config.only_head else "base"}
        return solid_metrics(config, lambda number, mesh: pipe(mesh, generator=[number], **options).meshes[0])

    def pipeline(self, model: ShapeVAE) -> ShapeReconstructionPipeline:
        """Return the pipeline around a trained VAE; with `only_head`, around the one it started from and the decoder with its slim head."""
        if not self.config.only_head:
            return ShapeReconstructionPipeline(model, octree_resolution=RESOLUTION)
        base = ShapeVAE.from_pretrained(str(self.config.start), torch_dtype=torch.float32)
        slim = ShapeVAE(**{**model.config, "num_encoder_layers": None, "scale_factor": base.config["scale_factor"]})
        slim.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith(("encoder.", "pre_kl."))})
        return ShapeReconstructionPipeline(base, slim.eval(), octree_resolution=RESOLUTION)

    @torch.no_grad()
    def latent_scale(self, model: ShapeVAE) -> float:
        """Return the factor that gives the latents of (at most `SCALED`) training shapes unit variance."""
        device, places = next(model.parameters()).device, torch.linspace(0, len(self.data) - 1, min(SCALED, len(self.data))).long()
        squares = []
        for place in places.tolist():
            batch = {name: rows[None].to(device) for name, rows in self.data[place].items()}
            posterior = model.encode(self.draw(batch, StepContext(0, self.config.seed, device))["surface"])
            squares.append((posterior.mean.square() + posterior.std.square()).mean())
        return float(torch.stack(squares).mean().rsqrt())

    def export(self, modules: dict[str, nn.Module], out: Path) -> None:
        """Write the pipeline; generators see its latents with unit variance."""
        model = cast(VAELoss, modules["vae"]).model.eval()
        if not self.config.only_head:
            model.register_to_config(scale_factor=self.latent_scale(model))
        pipe = self.pipeline(model)
        if self.config.export_dtype == "float16":
            pipe.register_modules(**{name: part.half() for name, part in pipe.components.items() if isinstance(part, nn.Module)})
        pipe.save_pretrained(out)


def _some(ctx: StepContext, name: str, b: int, first: int, count: int, wanted: int) -> Tensor:
    """Return places [b, wanted] among `count` from `first` on, without repetition where there are enough."""
    if wanted <= count:
        return first + ctx.rand(name, b, count).argsort(dim=1)[:, :wanted]
    return first + (ctx.rand(name, b, wanted) * count).long()


def symmetries(u: Tensor) -> Tensor:
    """Return one of the eight ways in which an upright box with a square base falls onto itself, [b, 3, 3], of uniform draws [b].

    Coordinates are multiplied from the left, `points @ result`: signs of x and z, and x and z exchanged or not.
    """
    bits = ((u * 8).long().clamp(0, 7)[:, None] >> torch.arange(3, device=u.device)) & 1
    signs, one = (1 - 2 * bits[:, :2]).to(u.dtype), torch.ones_like(u)
    straight = torch.diag_embed(torch.stack([signs[:, 0], one, signs[:, 1]], dim=1))
    return torch.where(bits[:, 2, None, None].bool(), straight.flip(-1), straight)


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
