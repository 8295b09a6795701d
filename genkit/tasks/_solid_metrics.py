"""Metrics of shape tasks while training: what is made of true meshes that were not trained on, against them (`genkit.eval.solids`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from genkit.checks import choose
from genkit.data.shape_samples import meshes_of
from genkit.data.surfaces import normalised
from genkit.data.views import ViewDataset
from genkit.eval.solids import METRICS, Solid
from genkit.pipelines.shape import ShapePipeline
from genkit.tokenizers.volume_decoders import NoSurfaceError
from genkit.training.evaluation import EvaluationConfig

VIEW = 2  # of a turntable of 16: what generated shapes are given
RESOLUTION = 64  # cells of the grid a side, if `size` says nothing
WITHOUT = "without-surface"


def check_solid_metrics(config: EvaluationConfig) -> None:
    """Refuse metrics that shapes do not have.

    Raises:
        ValueError: naming the nearest.
    """
    for name in config.metrics:
        choose(name, METRICS, "metric of shapes")


def solid_metrics(config: EvaluationConfig, make: Callable[[int, Any], Any]) -> dict[str, float]:
    """Return the means of the metrics over meshes spread evenly over the data, and the share of shapes without a surface.

    Args:
        config: `real` is a parquet file with meshes or a folder of mesh files, `num_samples` how many to take at most.
        make: (number of the mesh, mesh that spans [-1, 1]) -> mesh. Raises NoSurfaceError if there is none: no overlap then, no distance.
    """
    items, rows, without = meshes_of(config.real), [], 0
    chosen = np.unique(np.linspace(0, len(items) - 1, min(config.num_samples, len(items))).round().astype(int)).tolist()
    for number in chosen:
        mesh, _, _ = normalised(items[number][1]())
        truth = Solid.of(mesh, seed=number)
        try:
            rows.append(truth.compare(truth.of_closed(make(number, mesh), number + 1)))
        except NoSurfaceError:
            without += 1
            rows.append({name: 0.0 for name in METRICS if not name.startswith("chamfer")})
    found = {name: [row[name] for row in rows if name in row] for name in config.metrics}
    return {name: float(np.mean(values)) for name, values in found.items() if values} | {WITHOUT: without / len(chosen)}


def generated_metrics(config: EvaluationConfig, pipe: ShapePipeline, image_size: int) -> dict[str, float]:
    """Return the metrics of shapes made from a view of each mesh, or from its caption where the model takes no pictures.

    Args:
        config: `real` is a parquet file with views and meshes.
        pipe: makes the shapes.
        image_size: pictures are reduced to this side first.
    """
    views = ViewDataset(config.real, image_size)
    pipe.set_progress_bar_config(disable=True)

    def make(number: int, mesh: Any) -> Any:
        prompt = views.captions[number] if pipe.image_encoder is None else views.picture(number, min(VIEW, len(views.views_of(number)) - 1))
        return pipe(prompt, generator=[number], octree_resolution=config.size or RESOLUTION).meshes[0]

    return solid_metrics(config, make)
