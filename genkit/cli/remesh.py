"""`genkit remesh`: any shape to a clean low-poly mesh, with a preview of both."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from genkit.cli._meshes import MESHES, POINTS, add_running, check_files, where_first, write_preview
from genkit.cli._output import positive, print_json
from genkit.cli._sampling import load_pipeline

DEFAULT_MODEL = "genkit/meshanything-lowpoly"
HELP = "turn a scan, a dense mesh or a point cloud into a clean low-poly mesh"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("shape", type=Path, help=f"{', '.join(MESHES)} or whatever else trimesh reads, +Y up; or points with unit normals [p, 6] as .npy")
    add("--model", default=DEFAULT_MODEL, help="packaged name, folder or official file, see `genkit list` (default: %(default)s)")
    add("--out", type=Path, default=Path("lowpoly.glb"), metavar="FILE", help="mesh to write (default: %(default)s)")
    add("--max-faces", type=positive, metavar="N", help="budget (default: the model's)")
    add("--face-target", type=positive, metavar="N", help="faces to aim at")
    add(
        "--shell-depth",
        type=int,
        metavar="D",
        help="sample a new closed surface around the mesh, of 2^D grid points a side; 7 as published",
    )
    add(
        "--sample",
        action=argparse.BooleanOptionalAction,
        help="draw tokens, or take the most probable (default: drawn where there are several candidates)",
    )
    add("--temperature", type=float, metavar="T", help="of the drawing (default: the model's)")
    add("--top-k", type=int, default=50, metavar="K", help="draw among so many, 0 for all (default: %(default)s)")
    add(
        "--top-p", type=float, default=0.95, metavar="P", help="draw among the most probable that make up this share (default: %(default)s)"
    )
    add("--candidates", type=positive, metavar="N", help="meshes to draw, of which the nearest to the shape is kept (default: the model's)")
    add("--no-grammar", action="store_true", help="let illegal sequences through, as the released code does")
    add("--preview", type=Path, metavar="FILE", help="views of both, the shape above, a .png, or a turning .gif (default: beside the mesh)")
    add_running(parser, "points and drawing")


def run(args: argparse.Namespace) -> int:
    """Make the mesh, write it and the preview, and say what became of it."""
    check_files(args.out, args.preview, [args.model], args.shape, "shape")
    from genkit.eval.meshes import compare, load_mesh

    original: Any = load_points(args.shape) if args.shape.suffix.lower() == ".npy" else load_mesh(args.shape)
    began = time.perf_counter()
    pipe: Any = load_pipeline(args)
    if not hasattr(pipe, "point_encoder"):
        raise ValueError(
            f"{args.model} is a {type(pipe).__name__}, which makes no meshes of shapes; `genkit list` says what each model makes."
        )
    loaded = time.perf_counter()
    output = pipe(
        original, max_faces=args.max_faces, face_target=args.face_target, shell_depth=args.shell_depth, do_sample=args.sample,
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, use_grammar=not args.no_grammar,
        candidates=args.candidates, generator=[args.seed],
    )  # fmt: skip
    done = time.perf_counter()
    mesh, report = output.meshes[0], output.reports[0]
    if not report.faces:
        raise ValueError(f"the model wrote no face ({report.problem}); try without --no-grammar.")
    mesh.export(args.out)
    is_mesh = hasattr(original, "faces")
    preview = args.preview or args.out.with_name(f"{args.out.stem}-preview.png")
    write_preview(preview, [original, mesh] if is_mesh else [mesh], wireframe=True)
    values = compare(original, mesh, POINTS, POINTS // 2) if is_mesh else {}
    record = {
        "mesh": str(args.out), "preview": str(preview), "model": args.model, "faces_before": len(original.faces) if is_mesh else None,
        "vertices": len(mesh.vertices), "faces": report.faces, "watertight": bool(mesh.is_watertight), "tokens": report.tokens,
        "dropped_tokens": report.dropped, "complete": report.is_complete, "problem": report.problem, "metrics": values,
        "seconds": {"load": round(loaded - began, 3), "remesh": round(done - loaded, 3)},
    }  # fmt: skip
    if args.json:
        print_json(record)
        return 0
    before = f"{len(original.faces):,} faces" if is_mesh else f"{len(original):,} points"
    closed = "closed" if mesh.is_watertight else "open"
    counts = f"{before} -> {report.faces:,} faces, {len(mesh.vertices):,} vertices"
    print(f"wrote {args.out}: {counts}, {closed}; {preview}: the shape {where_first(preview)}")
    if not report.is_complete or report.dropped:
        print(f"the sequence {'ended' if report.is_complete else 'did not end by itself'}, {report.dropped} tokens made no face")
    named = {"Chamfer L1": "chamfer-l1-sum", "normal consistency": "normal-consistency", "volume IoU": "volume-iou"}
    if values:
        print(", ".join(f"{name} {values[key]:.3f}" for name, key in named.items() if key in values))
    rate = f"{report.tokens} tokens in {done - loaded:.1f} s"
    print(f"{rate}, {loaded - began:.1f} s to load {args.model} on {pipe.device}")
    return 0


def load_points(path: Path) -> Any:
    """Return the array in a .npy file.

    Raises:
        ValueError: if it holds something else.
    """
    import numpy as np

    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as an array of numbers ({error}).") from error
