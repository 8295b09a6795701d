"""How short meshes become as tokens: the layouts side by side on a real data set.

    python eval/mesh_compression.py --data data/lowpoly/train.parquet data/lowpoly/test.parquet

Meshes are boxed, quantised to `--bins` steps and brought into canonical order, as for training. A face costs nine tokens in the layout
`faces`; `adjacent` writes strips, and a face costs less the longer they are. "share" is of nine tokens a face, over all meshes of the row
together; "a strip" counts faces; "exact" the meshes that come back with the same faces. "lost" is what quantising takes: faces whose
corners fell together or that are there twice.
"""

import argparse
from collections.abc import Sequence

import numpy as np

from genkit.data.mesh_samples import MeshBounds, MeshSamples
from genkit.tokenizers.mesh_tokens import BINS, AdjacentTokens, CanonicalMesh, FaceTokens, TokenLayout, canonical, quantised, strips_of

GROUPS = ((1, 50), (51, 200), (201, 800), (801, 1600), (1601, 10**9))
HEAD = ("faces", "meshes", "lost", "layout", "tokens a face", "share", "longest", "faces a strip", "exact")


def is_exact(layout: TokenLayout, mesh: CanonicalMesh) -> bool:
    """Tell whether a mesh comes back from its tokens with the same faces."""
    triangles = layout.decode(layout.encode(mesh)).triangles
    again = canonical(triangles.reshape(-1, 3), np.arange(3 * len(triangles)))
    return np.array_equal(again.vertices, mesh.vertices) and np.array_equal(again.faces, mesh.faces)


def rows(meshes: Sequence[CanonicalMesh], label: str, layouts: Sequence[TokenLayout]) -> list[tuple[str, ...]]:
    """Return a row for each layout."""
    faces = np.array([len(mesh.faces) for mesh in meshes])
    lost = sum(mesh.degenerate + mesh.duplicate for mesh in meshes)
    strips = sum(len(strips_of(mesh.faces)) for mesh in meshes)
    found = []
    for layout in layouts:
        lengths = np.array([len(layout.encode(mesh)) for mesh in meshes])
        each = lengths / faces
        low, middle, high = np.quantile(each, (0.25, 0.5, 0.75))
        found.append(
            (
                label,
                f"{len(meshes):,}",
                f"{100 * lost / (lost + faces.sum()):.1f} %",
                f"`{layout.name}`",
                f"{middle:.2f} ({low:.2f} to {high:.2f})",
                f"{lengths.sum() / (9 * faces.sum()):.2f}",
                f"{lengths.max():,}",
                f"{faces.sum() / strips:.1f}" if isinstance(layout, AdjacentTokens) else "",
                f"{100 * np.mean([is_exact(layout, mesh) for mesh in meshes]):.0f} %",
            )
        )
    return found


def main() -> None:
    """Parse the command line, encode, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="folders of meshes, parquet files or hub data sets")
    parser.add_argument("--bins", type=int, default=BINS, help="steps a side (default: %(default)s)")
    args = parser.parse_args()
    stored = [mesh for path in args.data for mesh in MeshSamples(path, MeshBounds(max_faces=GROUPS[-1][1])).meshes]
    meshes = [canonical(quantised(mesh.vertices, args.bins), mesh.faces) for mesh in stored]
    usable = [mesh for mesh in meshes if len(mesh.faces)]
    layouts = FaceTokens(args.bins), AdjacentTokens(args.bins)
    print(f"{len(usable):,} meshes, {args.bins} steps; tokens a face: median (quartiles) over meshes\n")
    print("| " + " | ".join(HEAD) + " |\n" + "|---" * len(HEAD) + "|")
    for low, high in (*GROUPS, (1, GROUPS[-1][1])):
        part = [mesh for mesh in usable if low <= len(mesh.faces) <= high]
        is_all, is_last = low == 1 and high == GROUPS[-1][1], high == GROUPS[-1][1]
        label = "all" if is_all else f"{low:,} and more" if is_last else f"{low:,} to {high:,}"
        for row in rows(part, label, layouts) if part else ():
            print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
