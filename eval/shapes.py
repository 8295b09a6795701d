"""Shape VAEs and volume decoders on real meshes: how near the reconstructions are, and how far each decoder is from the first.

    python eval/shapes.py --models runs/shape-vae-lowpoly/export --data data/lowpoly/test.parquet --sheet sheet.png
    python eval/shapes.py --models FOLDER SLIM_FOLDER --data data/lowpoly/test.parquet --decoders dense hierarchical flash:selection=mass

Volume IoU: inside or outside at points spread over the cube that holds the shape; surface IoU: at points near its surface. The truth is the
field that the model is trained on (`genkit.data.mesh_fields`), which gives meshes that do not close an inside too. Chamfer distance (L1,
both directions added) and F-score compare points on the surfaces; shapes span 2. Intervals are 95 %, bootstrap over shapes. `--sheet` shows
originals above reconstructions by the first row of the table.

"""

import argparse
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from _mesh_tables import cell, sheet, spread
from torch import Tensor

from genkit import GenPipeline
from genkit.data.mesh_fields import MeshField
from genkit.data.surfaces import normalised
from genkit.data.winding import winding_numbers
from genkit.eval.meshes import sample
from genkit.eval.shapes import PointDistances, occupancy_iou

NEAR = 0.02  # standard deviation of points near the surface
THRESHOLD = 0.02  # of the F-score
METRICS = ("volume IoU", "surface IoU", "Chamfer", "F-score")


def parse_decoder(text: str) -> tuple[str, dict[str, Any]]:
    """Return a decoder's name and options, of "flash" or "flash:selection=mass,rule=grow".

    Raises:
        SystemExit: for options without a value.
    """
    name, _, rest = text.partition(":")
    pairs = [part.partition("=") for part in rest.split(",") if part]
    if any(not equals for _, equals, _ in pairs):
        raise SystemExit(f"--decoders {text}: options are written name:option=value,option=value.")
    return name, {key: yaml.safe_load(value) for key, _, value in pairs}


@dataclass
class Row:
    """What one way made of all shapes: metric -> values, and the meshes."""

    values: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in (*METRICS, "evaluated", "seconds")})
    meshes: list[Any] = field(default_factory=list)


def inside(mesh: Any, points: Tensor) -> Tensor:
    """Return which points [q] lie in a closed mesh."""
    corners, faces = torch.from_numpy(np.array(mesh.vertices)), torch.from_numpy(np.array(mesh.faces))
    return winding_numbers(points, corners, faces) > 0.5


def figures(points: Tensor, surface: Tensor, truths: list[Tensor], queries: list[Tensor], mesh: Any) -> dict[str, float]:
    """Measure a reconstruction.

    Args:
        points: [p, 3] on the true surface.
        surface: [p, 3] on the reconstruction's.
        truths: which points of each kind of query are inside.
        queries: over the volume, and near the surface.
        mesh: the reconstruction.
    """
    found = PointDistances.between(points, surface)
    ious = [occupancy_iou(truth, inside(mesh, at)) for truth, at in zip(truths, queries, strict=True)]
    return dict(zip(METRICS, (*ious, found.chamfer(), found.fscore(THRESHOLD)[0]), strict=True))


def spread_queries(surface: Tensor, count: int, seed: int) -> list[Tensor]:
    """Return points [count, 3] over the cube [-1, 1]^3 and near surface points."""
    draw = torch.Generator().manual_seed(seed)
    near = surface[torch.randint(len(surface), (count,), generator=draw)]
    cube = 2 * torch.rand(count, 3, generator=draw, dtype=torch.float64) - 1
    return [cube, near + NEAR * torch.randn(count, 3, generator=draw, dtype=torch.float64)]


def measure(
    pipes: dict[str, Any], decoders: list[str], meshes: list[Any], resolution: int, count: int
) -> tuple[dict[str, Row], dict[str, Row]]:
    """Reconstruct all meshes in every way; return the figures against the truth, and against the first way."""
    ways = [(f"{name}, {decoder}" if len(pipes) > 1 else decoder, pipe, decoder) for name, pipe in pipes.items() for decoder in decoders]
    against_truth, against_first = ({label: Row() for label, _, _ in ways} for _ in range(2))
    for seed, mesh in enumerate(meshes):
        centred, _, _ = normalised(mesh)
        points, _ = sample(centred, count, seed)
        queries = spread_queries(points, count, seed)
        truths = [MeshField.of(centred)(at) > 0 for at in queries]
        first: Any = None
        for label, pipe, decoder in ways:
            name, options = parse_decoder(decoder)
            began = time.perf_counter()
            output = pipe(centred, octree_resolution=resolution, decoder=name, decoder_options=options, generator=[seed])
            seconds = time.perf_counter() - began
            found, grid_field = output.meshes[0], output.fields[0]
            surface, _ = sample(found, count, seed + 1)
            row = against_truth[label]
            row.meshes.append(found)
            values = figures(points, surface, truths, queries, found)
            values |= {"evaluated": grid_field.evaluations / (grid_field.resolution + 1) ** 3, "seconds": seconds}
            for key, value in values.items():
                row.values[key].append(value)
            if first is None:
                first = (surface, [inside(found, at) for at in queries])
                continue
            for key, value in figures(first[0], surface, first[1], queries, found).items():
                against_first[label].values[key].append(value)
    return against_truth, dict(list(against_first.items())[1:])


def table(rows: dict[str, Row], columns: tuple[str, ...]) -> None:
    """Print means and intervals."""
    print("| decoder |", " | ".join(columns), "|")
    print("|---" * (len(columns) + 1) + "|")
    for label, row in rows.items():
        cells = []
        for column in columns:
            values = torch.tensor(row.values[column], dtype=torch.float64)
            if column in METRICS:
                cells.append(cell(row.values[column]))
            else:
                cells.append(f"{100 * values.mean():.1f} %" if column == "evaluated" else f"{values.median():.2f}")
        print(f"| {label} |", " | ".join(cells), "|")
    print()


def main() -> None:
    """Parse the command line, measure, print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, help="packaged names, folders or official files")
    parser.add_argument("--data", required=True, help="parquet file with meshes, or folder of mesh files")
    parser.add_argument("--decoders", nargs="+", default=["dense", "hierarchical", "flash"], help="name or name:option=value,...")
    parser.add_argument("--resolution", type=int, default=128, help="cells of the grid a side")
    parser.add_argument("--count", type=int, default=24, help="shapes, evenly spread over the data")
    parser.add_argument("--points", type=int, default=4000, help="on each surface, and queries of each kind")
    parser.add_argument("--sheet", type=Path, help="picture of originals above reconstructions")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    pipes: dict[str, Any] = {}
    for name in args.models:
        pipes[name] = GenPipeline.from_pretrained(name)
        pipes[name].set_progress_bar_config(disable=True)
    meshes = spread(args.data, args.count)
    truth, deviation = measure(pipes, args.decoders, meshes, args.resolution, args.points)
    if args.sheet:
        sheet(args.sheet, [meshes, next(iter(truth.values())).meshes])
        print(f"{args.sheet}: originals above reconstructions\n")
    if args.json:
        parts = {"truth": truth, "first": deviation}
        print(json.dumps({name: {label: row.values for label, row in rows.items()} for name, rows in parts.items()}))
        return
    print(f"{len(meshes)} shapes, resolution {args.resolution}, {args.points} points; {torch.get_num_threads()} threads\n")
    table(truth, (*METRICS, "evaluated", "seconds"))
    if deviation:
        print(f"against {next(iter(truth))}:\n")
        table(deviation, METRICS)


if __name__ == "__main__":
    main()
