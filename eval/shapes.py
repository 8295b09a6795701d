"""Shape VAEs and volume decoders on real meshes: how near the reconstructions are, and how far each decoder is from the first.

    python eval/shapes.py --models runs/shape-vae-lowpoly/export --data data/lowpoly/test.parquet --sheet sheet.png
    python eval/shapes.py --models genkit/shape-vae-lowpoly --data data/lowpoly/test.parquet --decoders dense hierarchical flash:head=slim

Volume IoU: inside or outside at points spread over the cube that holds the shape; surface IoU: at points near its surface. The truth is the
field that the model is trained on (`genkit.data.mesh_fields`), which gives meshes that do not close an inside too. Chamfer distance (L1,
both directions added) and F-score go from points on one surface to many more on the other; shapes span 2. Intervals are 95 %, bootstrap
over shapes. `--sheet` shows originals above reconstructions by the first row of the table.
"""

import argparse
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _mesh_tables import cell, named_options, sheet, spread

from genkit import GenPipeline
from genkit.data.surfaces import normalised
from genkit.eval.solids import METRICS, Solid

COLUMNS = {"volume IoU": "volume-iou", "surface IoU": "surface-iou", "Chamfer": "chamfer-l1-sum", "F-score": "fscore@0.02"}


@dataclass
class Row:
    """What one way made of all shapes: metric -> values, and the meshes."""

    values: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in (*METRICS, "evaluated", "seconds")})
    meshes: list[Any] = field(default_factory=list)

    def add(self, values: dict[str, float]) -> None:
        """Add the figures of one shape."""
        for key, value in values.items():
            self.values[key].append(value)


def measure(
    pipes: dict[str, Any], decoders: list[str], meshes: list[Any], resolution: int, count: int
) -> tuple[dict[str, Row], dict[str, Row]]:
    """Reconstruct all meshes in every way; return the figures against the truth, and against the first way."""
    ways = [(f"{name}, {decoder}" if len(pipes) > 1 else decoder, pipe, decoder) for name, pipe in pipes.items() for decoder in decoders]
    against_truth, against_first = ({label: Row() for label, _, _ in ways} for _ in range(2))
    for seed, mesh in enumerate(meshes):
        centred, _, _ = normalised(mesh)
        truth = Solid.of(centred, count, seed)
        first: Solid | None = None
        for label, pipe, decoder in ways:
            name, options = named_options("--decoders", decoder)
            head = options.pop("head", None)
            began = time.perf_counter()
            output = pipe(centred, octree_resolution=resolution, decoder=name, head=head, decoder_options=options, generator=[seed])
            seconds = time.perf_counter() - began
            found, grid_field = output.meshes[0], output.fields[0]
            solid, row = truth.of_closed(found, seed + 1), against_truth[label]
            row.meshes.append(found)
            share = grid_field.evaluations / (grid_field.resolution + 1) ** 3
            row.add(truth.compare(solid) | {"evaluated": share, "seconds": seconds})
            if first is None:
                first = solid
            else:
                against_first[label].add(first.compare(solid))
    return against_truth, dict(list(against_first.items())[1:])


def table(rows: dict[str, Row], columns: tuple[str, ...]) -> None:
    """Print means and intervals."""
    print("| decoder |", " | ".join(columns), "|")
    print("|---" * (len(columns) + 1) + "|")
    for label, row in rows.items():
        cells = []
        for column in columns:
            values = torch.tensor(row.values[COLUMNS.get(column, column)], dtype=torch.float64)
            if column in COLUMNS:
                cells.append(cell(values.tolist()))
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
    table(truth, (*COLUMNS, "evaluated", "seconds"))
    if deviation:
        print(f"against {next(iter(truth))}:\n")
        table(deviation, tuple(COLUMNS))


if __name__ == "__main__":
    main()
