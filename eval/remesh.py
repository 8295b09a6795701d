"""Artist-like meshes of real shapes: how near they are to the artist's own, and to what quadric decimation leaves of the dense shape.

    python eval/remesh.py --data data/lowpoly/test.parquet --max-faces 200 --sheet sheet.png

The shape is the artist's mesh, known by points of its surface. `decimated` closes it first (marching cubes of the distance, as
`shell_depth` does) and then takes away faces until it has as many as our mesh; `dense` is what it starts from. Valid: the sequence ended
by itself, no token was dropped, no face is degenerate or double. Chamfer and edge Chamfer distances: L1, both directions added, shapes
span 2; normal consistency ignores orientation. Intervals are 95 %, bootstrap over shapes. `--sheet` shows the artist's mesh above ours
above the decimated one.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _mesh_tables import cell, sheet, spread

from genkit import GenPipeline
from genkit.data.surfaces import normalised
from genkit.eval.meshes import compare
from genkit.pipelines.surface_shell import surface_shell
from genkit.tokenizers.isosurface import decimated

METRICS = {
    "Chamfer": "chamfer-l1-sum", "edge Chamfer": "edge-chamfer-l1-sum", "normal consistency": "normal-consistency",
    "faces / artist's": "face-ratio",
}  # fmt: skip
DEPTH = 7


def main() -> None:
    """Parse the command line, remesh, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="genkit/meshanything-lowpoly", help="packaged name, folder or official file")
    parser.add_argument("--data", required=True, help="parquet file with meshes, or folder of mesh files")
    parser.add_argument("--max-faces", type=int, default=200, help="of the artists' meshes, and of ours (default: %(default)s)")
    parser.add_argument("--count", type=int, default=10_000, help="shapes to look at, evenly spread over the data (default: all)")
    parser.add_argument("--points", type=int, default=20_000, help="on each surface; with few no edges are found (default: %(default)s)")
    parser.add_argument("--candidates", type=int, help="drawn, the nearest is kept; 1: most probable tokens (default: the model's)")
    parser.add_argument("--temperature", type=float, help="of the drawing (default: the model's)")
    parser.add_argument("--no-grammar", action="store_true", help="let illegal sequences through")
    parser.add_argument("--sheet", type=Path, help="picture of 24 shapes")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    pipe: Any = GenPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    meshes = [mesh for mesh in spread(args.data, args.count) if len(mesh.faces) <= args.max_faces]
    ways: dict[str, dict[str, list[float]]] = {name: {key: [] for key in METRICS} for name in ("genkit", "decimated", "dense")}
    rows: list[list[Any]] = [[], [], []]
    reports, seconds = [], []
    options = {"candidates": args.candidates, "temperature": args.temperature, "use_grammar": not args.no_grammar}
    options |= {} if args.no_grammar else {"max_faces": args.max_faces}
    for seed, mesh in enumerate(meshes):
        artist, _, _ = normalised(mesh)
        began = time.perf_counter()
        output = pipe(artist, generator=[seed], **options)
        seconds.append(time.perf_counter() - began)
        reports.append(output.reports[0])
        if not output.reports[0].faces:
            continue
        dense = surface_shell(artist, DEPTH)
        found = {"genkit": output.meshes[0], "decimated": decimated(dense, max(4, len(output.meshes[0].faces))), "dense": dense}
        for name, made in found.items():
            values = compare(artist, made, args.points, 500, seed)
            for key, metric in METRICS.items():
                if metric in values:
                    ways[name][key].append(values[metric])
        for row, shown in zip(rows, (artist, found["genkit"], found["decimated"]), strict=True):
            row.append(shown)
    valid = [r.is_complete and not (r.dropped or r.degenerate or r.duplicate or r.problem) for r in reports]
    if args.sheet:
        chosen = np.linspace(0, len(rows[0]) - 1, min(24, len(rows[0]))).round().astype(int)
        sheet(args.sheet, [[row[i] for i in chosen] for row in rows], (True, True, True))
    if args.json:
        print(json.dumps({"ways": ways, "valid": valid, "tokens": [r.tokens for r in reports], "seconds": seconds}))
        return
    print(f"{len(meshes)} shapes of up to {args.max_faces} faces; valid: {100 * np.mean(valid):.1f} %; {torch.get_num_threads()} threads")
    rate = sum(r.tokens for r in reports) / sum(seconds)
    print(f"{np.median(seconds):.1f} s a mesh (median), {rate:.0f} tokens/s\n")
    print("| mesh |", " | ".join(METRICS), "|")
    print("|---" * (len(METRICS) + 1) + "|")
    for name, values in ways.items():
        print(f"| {name} |", " | ".join(cell(values[key]) for key in METRICS), "|")


if __name__ == "__main__":
    main()
