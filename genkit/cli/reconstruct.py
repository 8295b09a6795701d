"""`genkit reconstruct`: a mesh through a shape VAE and back, with a preview of both."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from genkit.cli._meshes import MESHES, POINTS, add_running, check_files, where_first, write_preview
from genkit.cli._output import positive, print_json
from genkit.cli._sampling import load_pipeline

DEFAULT_MODEL = "genkit/shape-vae-lowpoly"
HELP = "reconstruct a mesh through a shape VAE"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("mesh", type=Path, help=f"{', '.join(MESHES)} or whatever else trimesh reads")
    add("--model", default=DEFAULT_MODEL, help="packaged name, folder or official file, see `genkit list` (default: %(default)s)")
    add("--out", type=Path, default=Path("reconstruction.glb"), metavar="FILE", help="mesh to write (default: %(default)s)")
    add("--resolution", type=positive, metavar="R", help="cells of the grid a side (default: the model's)")
    add("--decoder", choices=("dense", "hierarchical", "flash"), help="where the field is evaluated (default: the model's)")
    add("--head", choices=("base", "slim"), help="which head evaluates it (default: the model's)")
    add("--max-faces", type=positive, metavar="N", help="budget (default: as many as come)")
    add("--preview", type=Path, metavar="FILE", help="views of both, original above, a .png, or a turning .gif (default: beside the mesh)")
    add("--no-metrics", action="store_true", help="do not compare the result with the original")
    add_running(parser, "the surface points")


def run(args: argparse.Namespace) -> int:
    """Reconstruct, write mesh and preview, and say how near they are."""
    check_files(args.out, args.preview, [args.model], args.mesh, "mesh")
    from genkit.eval.meshes import compare, load_mesh

    original = load_mesh(args.mesh)
    began = time.perf_counter()
    pipe: Any = load_pipeline(args)
    if not hasattr(pipe, "vae") or not hasattr(pipe.vae, "query"):
        raise ValueError(
            f"{args.model} is a {type(pipe).__name__}, which reconstructs no meshes; `genkit list` says what each model makes."
        )
    loaded = time.perf_counter()
    options = {
        "octree_resolution": args.resolution,
        "decoder": args.decoder,
        "head": args.head,
        "max_faces": args.max_faces,
        "generator": [args.seed],
    }
    output = pipe(original, **options)
    done = time.perf_counter()
    found, field = output.meshes[0], output.fields[0]
    found.export(args.out)
    preview = args.preview or args.out.with_name(f"{args.out.stem}-preview.png")
    write_preview(preview, [original, found])
    values = {} if args.no_metrics else compare(original, found, POINTS, POINTS // 2)
    share = field.evaluations / (field.resolution + 1) ** 3
    record = {
        "mesh": str(args.out), "preview": str(preview), "model": args.model, "vertices": len(found.vertices), "faces": len(found.faces),
        "watertight": bool(found.is_watertight), "evaluated": share, "metrics": values,
        "seconds": {"load": round(loaded - began, 3), "reconstruct": round(done - loaded, 3)},
    }  # fmt: skip
    if args.json:
        print_json(record)
        return 0
    closed = "closed" if found.is_watertight else "open"
    counts = f"{len(found.vertices):,} vertices, {len(found.faces):,} faces"
    print(f"wrote {args.out}: {counts}, {closed}; {preview}: original {where_first(preview)}")
    if values:
        named = {"volume IoU": "volume-iou", "surface IoU": "surface-iou", "Chamfer L1": "chamfer-l1-sum"}
        print(", ".join(f"{name} {values[key]:.3f}" for name, key in named.items() if key in values))
    seconds = f"{done - loaded:.1f} s to reconstruct, {loaded - began:.1f} s to load {args.model} on {pipe.device}"
    print(f"{100 * share:.1f} % of the grid's points evaluated; {seconds}")
    return 0
