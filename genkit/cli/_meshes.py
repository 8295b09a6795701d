"""What the commands that read and write meshes share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from genkit.cli._models import check_model
from genkit.cli._output import add_json
from genkit.cli._sampling import check_out_folder, seed

MESHES = (".glb", ".obj", ".ply", ".stl", ".off")
VIEWS, VIEW_SIZE = 8, 160  # of a preview
GIF_VIEWS, GIF_SECONDS = 32, 4.0
PREVIEWS = (".png", ".gif")
POINTS = 2000  # of the comparison of two meshes


def add_running(parser: argparse.ArgumentParser, seed_of: str) -> None:
    """Add the options of how to run."""
    add = parser.add_argument
    add("--seed", type=seed, default=0, metavar="N", help=f"of {seed_of} (default: %(default)s)")
    add("--device", help="cpu, cuda, cuda:1, mps (default: an accelerator if there is one)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="precision (default: %(default)s)")
    add_json(parser)


def check_files(out: Path, preview: Path | None, models: list[str], source: Path | None = None, what: str = "mesh") -> None:
    """Refuse what can be known to be wrong before anything large is imported.

    Args:
        out: mesh to write.
        preview: picture to write, if named.
        models: as a person names them.
        source: file to read.
        what: it should hold.

    Raises:
        ValueError: for formats that cannot be written, or an unknown model.
        FileNotFoundError: for a file or folder that is not there.
    """
    if source is not None and not source.is_file():
        raise FileNotFoundError(f"there is no {what} at {str(source)!r}.")
    if out.suffix.lower() not in MESHES:
        raise ValueError(f"--out must end in {', '.join(MESHES)}, got {str(out)!r}.")
    if preview is not None and preview.suffix.lower() not in PREVIEWS:
        raise ValueError(f"--preview must end in {' or '.join(PREVIEWS)}, got {str(preview)!r}.")
    check_out_folder(out)
    for model in models:
        check_model(model)


def where_first(preview: Path) -> str:
    """Return where the first mesh of a preview stands."""
    return "on the left" if preview.suffix.lower() == ".gif" else "above"


def write_preview(path: Path, meshes: list[Any], wireframe: bool = False) -> None:
    """Write views of meshes, of the last one with its edges if asked: a .png, a row each, or a .gif in which they turn side by side."""
    from genkit.cli._pictures import grid, save_png
    from genkit.data.rendering import turntable

    moves = path.suffix.lower() == ".gif"
    views, last = GIF_VIEWS if moves else VIEWS, len(meshes) - 1
    rows = [turntable(mesh, views, VIEW_SIZE, wireframe=wireframe and i == last) for i, mesh in enumerate(meshes)]
    if moves:
        from genkit.data.video_files import write_clip

        write_clip(path, [grid(list(frame), len(rows)) for frame in zip(*rows, strict=True)], views / GIF_SECONDS)
        return
    save_png(grid([picture for row in rows for picture in row], views), path, {"Software": "genkit"})
