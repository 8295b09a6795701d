"""Train a deterministic video predictor: given frames to as many future frames, by regression.

PredFormer: loss = mean squared error (Tang et al. 2024, arXiv 2410.04733). MIMO-VP: 10 MSE + L1 over the predictions of all decoder layers
(Ning et al. 2023, arXiv 2212.04655). Both on pixels in [0, 1].

Letters: b batch, f frames, c channels, h w rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from genkit.checks import choose
from genkit.data.clips import ClipDataset
from genkit.generators.mimo_vp import MIMOVP, fold_frames
from genkit.generators.predformer import PredFormer
from genkit.tasks._clip_metrics import ClipMetrics, batches, check_clip_metrics, held_out_clips
from genkit.tasks._clips import check_sources, to_strips, training_clips
from genkit.training.evaluation import EvaluationConfig
from genkit.training.optimizers import kernels, muon_with_adamw
from genkit.training.task import Phase, StepContext, Task

MODELS = ("predformer", "mimo_vp")
NUM_SAMPLES = 4


@dataclass
class Config:
    """Settings of the task.

    Attributes:
        data: clips, see `open_clips`; null for moving sprites.
        sprites: digits or other small pictures that move as in Moving MNIST, see `read_sprites`; null for other data.
        sequences: number of sequences of moving sprites.
        image_size: side of the frames in pixels.
        num_frames: frames given, and as many predicted.
        stride: step between frames.
        any_start: turntables may begin at any view.
        model: {"name": "predformer" or "mimo_vp", ...} with the options of `PredFormer` or `MIMOVP`; sizes are filled in.
        optimizer: "adamw" (PredFormer's), "adam" (MIMO-VP's), or "muon": Muon for matrices and kernels of the layers, AdamW for the rest.
        lr, weight_decay: of the optimizer.
        seed: of the initial weights and of the sprites' ways.
    """

    data: str | None = None
    sprites: str | None = None
    sequences: int = 1_000_000
    image_size: int = 64
    num_frames: int = 10
    stride: int = 1
    any_start: bool = True
    model: dict[str, Any] = field(default_factory=lambda: {"name": "predformer"})
    optimizer: Literal["adamw", "adam", "muon"] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        check_sources(self.data, self.sprites)
        if self.lr <= 0 or self.num_frames < 1:
            raise ValueError(f"lr and num_frames must be above 0, got {self.lr} and {self.num_frames}.")
        choose(self.model.get("name", ""), MODELS, "predictor")


class PredictorTask(Task):
    """One optimizer, one network: regress the second half of a clip on the first.

    Args:
        config: the settings.
        data: clips of twice `num_frames` frames, or closed turns of any length.
    """

    name = "predictor"
    ema = ("predictor",)

    def __init__(self, config: Config, data: ClipDataset) -> None:
        self.config, self.data = config, data
        options = {key: value for key, value in config.model.items() if key != "name"}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model: PredFormer | MIMOVP
            if config.model["name"] == "predformer":
                sizes = {"sample_size": config.image_size, "in_channels": data.channels, "num_frames": config.num_frames}
                model = PredFormer(**{**sizes, **options})
            else:
                model = MIMOVP(**{"in_channels": data.channels, **options})
        self.modules = {"predictor": PredictorLoss(model)}

    def dataset(self) -> Dataset[dict[str, Tensor]]:
        """Return the clips."""
        return self.data

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return one optimizer over all parameters."""
        c, model = self.config, self.modules["predictor"]
        if c.optimizer == "muon":
            blocks, rest = kernels(model, ("model.layers.", "model.encoder.", "model.decoder."))
            return {"main": muon_with_adamw(blocks, rest, lr=c.lr, betas=(0.9, 0.999), weight_decay=c.weight_decay)}
        if c.optimizer == "adam":
            return {"main": torch.optim.Adam(model.parameters(), lr=c.lr, weight_decay=c.weight_decay)}
        return {"main": torch.optim.AdamW(model.parameters(), lr=c.lr, weight_decay=c.weight_decay)}

    def halves(self, frames: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Return given and future frames [b, f, c, h, w]; a closed turn goes on at its beginning, from views [b, 1]."""
        f = self.config.num_frames
        if self.data.is_closed:
            rows, places = torch.arange(len(frames), device=frames.device)[:, None], torch.arange(2 * f, device=frames.device)
            frames = frames[rows, (start + places) % frames.shape[1]]
        return frames[:, :f], frames[:, f : 2 * f]

    def step(self, batch: dict[str, Tensor], ctx: StepContext) -> Iterator[Phase]:
        """Compute the loss."""
        frames, b = batch["frames"], len(batch["frames"])
        start = (ctx.rand("start", b, 1) * (frames.shape[1] if self.config.any_start else 0)).long()
        yield Phase("main", self.modules["predictor"](*self.halves(frames, start)))

    def sample(self, batch: dict[str, Tensor], ctx: StepContext) -> dict[str, Tensor]:
        """Return strips [2 m, c, h, 2 f w]: given frames with what follows, and with what is predicted."""
        frames = batch["frames"][:NUM_SAMPLES]
        given, future = self.halves(frames, torch.zeros(len(frames), 1, dtype=torch.long, device=frames.device))
        found = cast(Any, ctx.ema["predictor"]).model(given).frames
        rows = torch.stack([torch.cat([given, future], 1), torch.cat([given, found], 1)], 1).flatten(0, 1)
        return {"predicted": to_strips(rows)}

    def check_evaluation(self, config: EvaluationConfig) -> None:
        """Refuse metrics that clips do not have."""
        check_clip_metrics(config)

    def evaluate(self, config: EvaluationConfig, ctx: StepContext) -> dict[str, float]:
        """Return metrics of the second halves of clips that were not trained on; distances are those of whole clips."""
        c, f = self.config, self.config.num_frames
        clips = held_out_clips(config, c.sprites is not None, c.image_size, 2 * f, c.stride, c.seed)
        model, metrics = cast(Any, ctx.ema["predictor"]).model, ClipMetrics(config, 2 * f, ctx.device)
        for _, truth in batches(clips, config, ctx.device):
            made = torch.cat([truth[:, :f], model(truth[:, :f]).frames.float()], dim=1)
            hidden = torch.zeros(len(made), 2 * f, *made.shape[3:], dtype=torch.bool, device=made.device)
            hidden[:, f:] = True
            metrics.compare(made, truth, hidden)
            metrics.add("real", truth)
            metrics.add("made", made)
        return metrics.compute()

    def export(self, modules: dict[str, nn.Module], out: Path) -> None:
        """Write the predictor."""
        cast(PredictorLoss, modules["predictor"]).model.save_pretrained(out)


class PredictorLoss(nn.Module):
    """A predictor and its loss, as one module, so that several processes exchange gradients of what the loss uses.

    Args:
        model: the predictor.
    """

    def __init__(self, model: PredFormer | MIMOVP) -> None:
        super().__init__()
        self.model = model

    def forward(self, given: Tensor, future: Tensor) -> Tensor:
        """Return the scalar loss of frames [b, f, c, h, w] in [-1, 1]."""
        target = (future + 1) / 2
        if isinstance(self.model, PredFormer):
            return (self.model.next_frames((given + 1) / 2).float() - target).square().mean()
        patch = self.model.config["patch_size"]
        whole, folded = fold_frames(target, patch), fold_frames((given + 1) / 2, patch)
        errors = [found.float() - whole for found in self.model.predictions(folded)]
        return torch.stack([10 * error.square().mean() + error.abs().mean() for error in errors]).mean()


def build(config: Config) -> PredictorTask:
    """Build the task of a recipe: open the clips, or set sprites in motion."""
    c = config
    return PredictorTask(c, training_clips(c.data, c.sprites, c.image_size, 2 * c.num_frames, c.stride, c.sequences, c.seed))
