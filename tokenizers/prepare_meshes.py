"""Collect meshes for mesh generators into a parquet file: folders of meshes, archives, and free games' data from Debian packages.

    python tokenizers/prepare_meshes.py meshes/ --out meshes.parquet
    python tokenizers/prepare_meshes.py --debian 0ad-data megaglest-data supertuxkart-data --out games-train.parquet
    python tokenizers/prepare_meshes.py --debian ufoai-data openarena-data --out games-test.parquet

Whole files are meshes; equal positions are welded, degenerate and duplicate faces dropped, meshes with the same quantised geometry taken
once. Zip archives (.zip, .pk3, .wz) are read as they lie. Split by package, never by file: animations and damaged variants are near twins.
The data of games come under their own licences (GPL, CC-BY-SA and others, see each package's copyright file): every row names its source.
"""

import argparse
import subprocess
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from genkit.data.game_formats import READERS, read_mesh
from genkit.data.mesh_samples import MeshBounds, welded
from genkit.data.shape_samples import SUFFIXES
from genkit.tokenizers.mesh_tokens import canonical, quantised

ARCHIVES = (".zip", ".pk3", ".pk4", ".wz")
SURVIVING = 0.2  # share of faces that quantising has to leave


def files_of(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and bytes of every mesh below a folder, those in archives too."""
    for path in sorted(item for item in folder.rglob("*") if item.is_file()):
        name = path.relative_to(folder).as_posix()
        if path.suffix.lower() in ARCHIVES and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for member in sorted(archive.namelist()):
                    if Path(member).suffix.lower() in (*READERS, *SUFFIXES):
                        yield f"{name}/{member}", archive.read(member)
        elif path.suffix.lower() in (*READERS, *SUFFIXES):
            yield name, path.read_bytes()


def unpacked(package: str, folder: Path) -> Path:
    """Download a Debian package and unpack it.

    Raises:
        SystemExit: if that fails, with what the tools said.
    """
    out = folder / package
    out.mkdir()
    for command in (["apt-get", "download", package], ["sh", "-c", f"dpkg-deb -x {package}_*.deb {package} && rm {package}_*.deb"]):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return out


def main() -> None:
    """Parse the command line, read, filter, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="folders of meshes")
    parser.add_argument("--debian", nargs="+", default=[], metavar="PACKAGE", help="packages to download and read")
    parser.add_argument("--out", type=Path, required=True, help="parquet file to write")
    parser.add_argument("--min-faces", type=int, default=40)
    parser.add_argument("--max-faces", type=int, default=1600)
    parser.add_argument("--min-ratio", type=float, default=0.0, help="vertices per face; 0.4 to 0.7 as published")
    parser.add_argument("--max-ratio", type=float, default=3.0)
    args = parser.parse_args()
    if not args.folders and not args.debian:
        parser.error("give folders of meshes, or --debian packages.")
    if missing := [str(folder) for folder in args.folders if not folder.is_dir()]:
        parser.error(f"there is no folder {', '.join(missing)}.")
    bounds = MeshBounds(args.min_faces, args.max_faces, args.min_ratio, args.max_ratio)
    with tempfile.TemporaryDirectory() as temporary:
        sources = {str(folder): folder for folder in args.folders}
        rows: list[dict[str, object]] = []
        refused: Counter[str] = Counter()
        seen: set[bytes] = set()
        for name, folder in [*sources.items(), *((package, None) for package in args.debian)]:
            before = len(rows)
            read(name, folder or unpacked(name, Path(temporary)), bounds, rows, seen, refused)
            print(f"{name}: {len(rows) - before} meshes", flush=True)
    if not rows:
        raise SystemExit(f"no mesh can be used: {dict(refused)}")
    from datasets import Dataset

    Dataset.from_list(rows).to_parquet(args.out)
    print(f"{len(rows)} meshes in {args.out}; left out: {dict(refused)}")


def read(source: str, folder: Path, bounds: MeshBounds, rows: list[dict[str, object]], seen: set[bytes], refused: Counter[str]) -> None:
    """Add the meshes of a folder to the rows, and the reasons for those left out to `refused`."""
    for name, data in files_of(folder):
        try:
            vertices, faces = welded(*read_mesh(name, data))
        except ValueError:
            refused["cannot be read, or has no faces"] += 1
            continue
        mesh = canonical(quantised(vertices), faces)
        reason = bounds.refusal(len(vertices), len(faces))
        reason = reason or ("too much lost in quantising" if len(mesh.faces) < SURVIVING * len(faces) else "")
        key = mesh.vertices.tobytes()
        reason = reason or ("there already" if key in seen else "")
        if reason:
            refused[reason] += 1
            continue
        seen.add(key)
        rows.append(
            {
                "name": name,
                "source": source,
                "vertices": vertices.astype(np.float32).tolist(),
                "faces": faces.tolist(),
                "num_faces": len(faces),
            }
        )


if __name__ == "__main__":
    main()
