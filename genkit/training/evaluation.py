"""Metrics while training: what the averaged weights make, judged as `genkit eval` judges it, every so many steps.

A task that makes pictures has `generate`, and is judged by `picture_metrics`; one that makes something else overrides `Task.evaluate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from genkit.training.task import StepContext, Task

if TYPE_CHECKING:
    from torch import nn


@dataclass
class EvaluationConfig:
    """What to measure.

    Args:
        real: real pictures, or a file with their statistics, see `genkit eval --help`; of video and shape tasks, clips or meshes that were
            not trained on.
        metrics: names as `genkit eval` has them; of video tasks, see `genkit.tasks._clip_metrics`, of shapes, `genkit.eval.solids`.
        num_samples: pictures, clips or shapes to make.
        protocol: whose choices; "lite0" needs no download, its distance is not FID.
        size: another input size of the network than the protocol's, in pixels; of shapes, cells of the grid a side.
        weights: of the FID Inception network; of video tasks, of I3D.
        view_size: turntable views are reduced to this side, in pixels.
        views: which of a turntable's views are the real pictures; all if null.
        batch_size: pictures at a time.
    """

    real: str
    metrics: tuple[str, ...] = ("fid",)
    num_samples: int = 1000
    protocol: str = "lite0"
    size: int | None = None
    weights: str | None = None
    view_size: int = 64
    views: tuple[int, ...] | None = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.num_samples < 2 or self.batch_size < 1:
            raise ValueError(f"num_samples must be at least 2 and batch_size at least 1, got {self.num_samples} and {self.batch_size}.")
        if not self.metrics:
            raise ValueError("metrics must name at least one metric, got none.")


def check_pictures(config: EvaluationConfig) -> None:
    """Refuse metrics of pictures that do not exist.

    Raises:
        ValueError: for unknown metrics or protocols; names the nearest.
    """
    from genkit.eval.metrics import check_metrics
    from genkit.eval.protocols import get_protocol

    check_metrics(config.metrics, get_protocol(config.protocol, size=config.size))


def measure(task: Task, modules: dict[str, nn.Module], config: EvaluationConfig, ctx: StepContext) -> dict[str, float]:
    """Return `eval/<metric>` of what a task makes with its averaged weights, in every process.

    Args:
        task: what is trained.
        modules: trained modules, put into eval mode meanwhile.
        config: what to measure.
        ctx: of the step.
    """
    for module in modules.values():
        module.eval()
    found = task.evaluate(config, ctx)
    for module in modules.values():
        module.train()
    return {f"eval/{name}": value for name, value in found.items()}


def picture_metrics(task: Task, config: EvaluationConfig, ctx: StepContext) -> dict[str, float]:
    """Return the metrics of pictures that a task's `generate` makes.

    Args:
        task: has `generate`.
        config: what to measure.
        ctx: of the step.
    """
    import numpy as np

    from genkit.eval.evaluate import evaluate
    from genkit.eval.pictures import Picture, Source, open_source
    from genkit.eval.protocols import get_protocol
    from genkit.eval.statistics_files import is_statistics

    protocol = get_protocol(config.protocol, size=config.size)

    class Generated(Source):
        """Pictures of the task."""

        name, in_workers = f"{task.name}, step {ctx.step}", False

        def __len__(self) -> int:
            return config.num_samples

        def fingerprint(self) -> str:
            return f"{id(task):x}-{ctx.step}"  # never found again: the features are not kept

        def read(self, index: int) -> Picture:
            return self.read_many([index])[0]

        def read_many(self, indices: Sequence[int]) -> list[Picture]:
            scaled = (task.generate(list(indices), ctx).float().clamp(-1, 1) + 1) * 127.5
            steps = scaled if protocol.quantize == "truncate" else scaled.round()
            pixels = steps.byte().permute(0, 2, 3, 1).cpu().numpy()
            return [Picture(np.ascontiguousarray(p), f"{self.name}, picture {i}") for p, i in zip(pixels, indices, strict=True)]

    real = config.real if is_statistics(config.real) else open_source(config.real, view_size=config.view_size, views=config.views)
    found = evaluate(
        config.metrics, Generated(), real, protocol,
        weights=config.weights, device=ctx.device, batch_size=config.batch_size, workers=0, cache="", intervals=False,
    )  # fmt: skip
    return {result.metric: result.value for result in found.results}
