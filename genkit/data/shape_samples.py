"""Training samples of shapes: surfaces and fields of meshes, computed once by a job that resumes and reports what it could not use.

A folder holds `<name>.safetensors` per mesh (`surface`, `points`, `field`, see `field_samples`) and `report.json`: the settings, the names
in order, and the reason for each mesh that was left out.

Letters: p points.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save
from torch import Tensor
from torch.utils.data import Dataset

from genkit.data.files import atomic_write
from genkit.data.mesh_fields import FieldCounts, field_samples
from genkit.data.surfaces import normalised
from genkit.data.views import open_rows

if TYPE_CHECKING:
    from collections.abc import Callable

REPORT = "report.json"
SUFFIXES = (".obj", ".ply", ".stl", ".glb", ".gltf", ".off")


@dataclass
class Preparation:
    """What a preparation found.

    Attributes:
        names: of the meshes that can be used.
        refused: name -> reason.
        computed: how many were computed now; the others were there.
    """

    names: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    computed: int = 0


def meshes_of(path: str | Path, split: str = "train") -> list[tuple[str, Callable[[], Any]]]:
    """Return (name, function that loads the mesh) of a folder of mesh files, or of parquet rows with `vertices`, `faces` and `name`.

    Raises:
        FileNotFoundError: if nothing is there.
        ValueError: if rows lack the columns.
    """
    import trimesh

    local = Path(path).expanduser()
    files = sorted(file for file in local.rglob("*") if file.suffix.lower() in SUFFIXES) if local.is_dir() else []
    if files:
        load_file = partial(trimesh.load, force="mesh", process=False)
        return [("_".join(file.relative_to(local).with_suffix("").parts), partial(load_file, file)) for file in files]
    rows, _ = open_rows(path, split)
    lacking = [name for name in ("vertices", "faces", "name") if name not in rows.column_names]
    if lacking:
        raise ValueError(f"{str(path)!r} lacks the columns {lacking}; it has {rows.column_names}.")

    def load(i: int) -> Any:
        row = rows[i]
        return trimesh.Trimesh(np.array(row["vertices"], np.float64), np.array(row["faces"], np.int64), process=False)

    names = list(rows["name"])
    return [(f"{i:06d}_{name}", partial(load, i)) for i, name in enumerate(names)]


def prepare(
    path: str | Path, out: str | Path, counts: FieldCounts | None = None, *, split: str = "train", seed: int = 0, processes: int = 1
) -> Preparation:
    """Compute the samples of all meshes that have none yet, and write the report.

    Args:
        path: meshes, see `meshes_of`.
        out: folder; created if needed.
        counts: points of each kind.
        split: of a folder of parquet files or hub data set.
        seed: of the points; mesh i takes its own.
        processes: to work in.

    Raises:
        ValueError: if the folder holds samples made with other settings, or no mesh can be used.
    """
    counts, out = counts or FieldCounts(), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    settings = {"source": str(path), "split": split, "seed": seed, "counts": asdict(counts)}
    before = read_report(out) if (out / REPORT).is_file() else {}
    if before and before["settings"] != settings:
        raise ValueError(f"{str(out)!r} holds samples of other settings: {before['settings']}; choose another folder or remove it.")
    items = meshes_of(path, split)
    known: dict[str, str] = dict(before.get("refused", {}))
    jobs = [(name, i) for i, (name, _) in enumerate(items) if name not in known and not (out / f"{name}.safetensors").is_file()]
    _write_report(out, settings, [name for name, _ in items], known)
    done = Preparation(computed=len(jobs))
    for name, reason in _run(path, split, out, counts, seed, jobs, processes):
        if reason is not None:
            known[name] = reason
            _write_report(out, settings, [name for name, _ in items], known)
    done.names = [name for name, _ in items if name not in known]
    done.refused = known
    if not done.names:
        raise ValueError(
            f"{str(path)!r}: none of {len(items)} meshes can be used; the first: {next(iter(known.values()), 'nothing there')}"
        )
    return done


def _run(
    path: str | Path, split: str, out: Path, counts: FieldCounts, seed: int, jobs: Sequence[tuple[str, int]], processes: int
) -> Iterator[tuple[str, str | None]]:
    """Yield (name, reason or None) of every job as it is done."""
    if processes < 2:
        items = meshes_of(path, split) if jobs else []
        for name, i in jobs:
            yield name, _one(items[i][1], out / f"{name}.safetensors", counts, seed + i)
        return
    with ProcessPoolExecutor(processes, initializer=_start, initargs=(str(path), split)) as pool:
        arguments = [(i, str(out / f"{name}.safetensors"), counts, seed + i) for name, i in jobs]
        yield from zip([name for name, _ in jobs], pool.map(_in_process, arguments), strict=True)


_ITEMS: list[tuple[str, Callable[[], Any]]] = []


def _start(path: str, split: str) -> None:
    """Open the meshes in a process."""
    torch.set_num_threads(1)
    _ITEMS[:] = meshes_of(path, split)


def _in_process(job: tuple[int, str, FieldCounts, int]) -> str | None:
    i, path, counts, seed = job
    return _one(_ITEMS[i][1], Path(path), counts, seed)


def _one(load: Callable[[], Any], target: Path, counts: FieldCounts, seed: int) -> str | None:
    """Compute and write one sample; return why it cannot be used, if so."""
    try:
        mesh, _, _ = normalised(load())
        arrays = field_samples(mesh, counts, seed)
    except (ValueError, OSError, KeyError, IndexError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    with atomic_write(target) as file:
        file.write(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))
    return None


def read_report(folder: Path) -> dict[str, Any]:
    """Return the report of a folder of samples.

    Raises:
        FileNotFoundError: if there is none.
    """
    path = folder / REPORT
    if not path.is_file():
        raise FileNotFoundError(f"{str(folder)!r} holds no shape samples (no {REPORT}); run tokenizers/prepare_shapes.py first.")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _write_report(folder: Path, settings: dict[str, Any], names: Sequence[str], refused: dict[str, str]) -> None:
    with atomic_write(folder / REPORT) as file:
        file.write(json.dumps({"settings": settings, "names": list(names), "refused": refused}, indent=1).encode())


class ShapeSamples(Dataset[dict[str, Tensor]]):
    """Prepared shapes; item i is {"surface" [p, 7], "points" [p, 3], "field" [p], "index"}, float32.

    Args:
        folder: from `prepare`.

    Raises:
        FileNotFoundError: if the folder has no report, or the preparation did not finish.

    Attributes:
        names: one per item.
        counts: points of each kind.
        data_hash: changes with the meshes, the settings and their files.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        report = read_report(self.folder)
        self.names: list[str] = [name for name in report["names"] if name not in report["refused"]]
        self.counts = FieldCounts(**report["settings"]["counts"])
        missing = [name for name in self.names if not (self.folder / f"{name}.safetensors").is_file()]
        if missing:
            listed = ", ".join(missing[:5])
            raise FileNotFoundError(f"{str(folder)!r} lacks {len(missing)} of {len(self.names)} samples ({listed}); run the job again.")
        sizes = [os.stat(self.folder / f"{name}.safetensors").st_size for name in self.names]
        self.data_hash = hashlib.sha256(repr((report["settings"], self.names, sizes)).encode()).hexdigest()[:24]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"shape index {index} is outside 0..{len(self) - 1}.")
        with safe_open(self.folder / f"{self.names[index]}.safetensors", "pt") as file:
            return {name: file.get_tensor(name) for name in ("surface", "points", "field")} | {"index": torch.tensor(index)}
