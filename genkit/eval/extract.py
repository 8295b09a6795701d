"""From pictures to features: one pass over a source, any number of layers, several processes, kept on disk.

Pictures stream through decoding, resizing and the network in batches; features are written to memory-mapped files, so that memory does not
grow with the number of pictures. Several processes share the batches and the first one writes every row in its place: the files, and
with them every number, are those of a single process. Features are cached by data and protocol.

Letters: n pictures, d features, b batch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from typing import Protocol as Protocol_

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from genkit.checks import choose, shorten
from genkit.eval.features import FEATURES, FeatureNetwork
from genkit.eval.inception import TAPS, InceptionV3, fetch_weights, file_hash
from genkit.eval.pictures import Picture, PictureError, Source
from genkit.eval.protocols import Protocol
from genkit.eval.resize import resize
from genkit.paths import cache_dir, whole_folder
from genkit.weights import read_checkpoint

Progress = Callable[[int, int, float], None]


class FeatureExtractor(Protocol_):
    """What `extract` asks of a network: its choices, layers and widths, names for the cache, and features of pictures."""

    protocol: Protocol
    taps: dict[str, int]
    weights: str

    def source(self, tap: str) -> str:
        """Return what features of a layer are."""

    def __call__(self, pictures: Sequence[np.ndarray[Any, Any]], taps: Iterable[str]) -> dict[str, Tensor]:
        """Compute features of pictures [h, w, 3] uint8: each tap [b, d] float32 on the CPU."""


class Extractor:
    """A protocol's network behind its preparation of pictures.

    Args:
        protocol: what to compute.
        weights: file of the FID Inception network; fetched once into the cache folder if None. Not for other networks.
        device: where to compute.

    Raises:
        OSError: if the weights cannot be fetched.
        ValueError: if they do not fit.

    Attributes:
        taps: layers and their widths.
        weights: first digits of the weight file's hash, or the network's name.
    """

    def __init__(self, protocol: Protocol, weights: str | Path | None = None, device: str | torch.device = "cpu") -> None:
        self.protocol, self.device = protocol, torch.device(device)
        if protocol.is_fid:
            path = Path(weights).expanduser() if weights is not None else fetch_weights(cache_dir() / "weights")
            if not path.is_file():
                raise FileNotFoundError(f"the weights of the FID Inception network: {str(path)!r} does not exist.")
            self.taps, self.weights = dict(TAPS), file_hash(path)[:8]
            network = InceptionV3(read_checkpoint(path)[0]).to(self.device)
            self._run: Callable[[Tensor, Iterable[str]], dict[str, Tensor]] = network
        else:
            if weights is not None:
                raise ValueError(
                    f"weights are given for the FID Inception network, but protocol {protocol.name!r} uses {protocol.network}."
                )
            judge = FeatureNetwork(protocol.network, size=None).to(self.device)
            self.taps, self.weights = {str(FEATURES): FEATURES}, protocol.network
            self._run = lambda images, taps: {str(FEATURES): judge.features(images)}

    def source(self, tap: str) -> str:
        """Return what features of a layer are, for statistics files: two that differ in it cannot be compared."""
        p = self.protocol
        return f"{p.network} {self.weights}, {p.resize} to {p.size}, {p.value_range}, {tap}"

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[np.ndarray[Any, Any]], taps: Iterable[str]) -> dict[str, Tensor]:
        """Compute features of pictures [h, w, 3] uint8 of any sizes.

        Returns:
            Each tap [b, d] float32 on the CPU.
        """
        size, sizes = self.protocol.size, [picture.shape[:2] for picture in pictures]
        prepared = torch.empty(len(pictures), 3, size, size, device=self.device)
        for shape in sorted(set(sizes)):
            rows = [i for i, own in enumerate(sizes) if own == shape]
            stacked = torch.from_numpy(np.stack([pictures[i] for i in rows])).to(self.device).permute(0, 3, 1, 2)
            prepared[rows] = self.protocol.normalise(resize(stacked, size, self.protocol.resize))
        return {tap: value.float().cpu() for tap, value in self._run(prepared, tuple(taps)).items()}


@dataclass
class FeatureSet:
    """Features of the pictures of a source, memory-mapped.

    Attributes:
        arrays: layer -> [n, d] float32; none in processes but the first.
        names, labels: of the pictures.
        conversions: how many pictures were converted, by kind.
        left_out: pictures that could not be used, with the reason; the run was told to go on.
        source: name of the source.
        sources: layer -> what its features are.
    """

    arrays: dict[str, np.ndarray[Any, Any]]
    names: list[str]
    labels: list[str]
    conversions: dict[str, int]
    left_out: list[str]
    source: str
    sources: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def tensor(self, tap: str) -> Tensor:
        """Return a layer [n, d] as a tensor over the mapped file; what is written to it does not reach the file."""
        return torch.from_numpy(np.asarray(self.arrays[tap]))


class _Reader(Dataset[tuple[int, "Picture | None", str]]):
    """Map-style wrapper whose items never raise: (index, picture or None, reason)."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[int, Picture | None, str]:
        try:
            return index, self.source.read(index), ""
        except PictureError as error:
            return index, None, str(error)


def _processes() -> tuple[int, int]:
    """Return (rank, world) of the process group, (0, 1) without one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _from_first(value: Any) -> Any:
    """Return what the first process has."""
    if _processes()[1] == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box)
    return box[0]


def read_batches(source: Source, indices: Sequence[Sequence[int]], workers: int) -> Iterator[list[tuple[int, Picture | None, str]]]:
    """Yield batches of (index, picture or None, why there is none), read in worker processes where the source allows it.

    Args:
        source: the pictures.
        indices: of each batch.
        workers: processes; 0 reads here.
    """
    if not source.in_workers:
        for batch in indices:
            yield [(i, picture, "") for i, picture in zip(batch, source.read_many(batch), strict=True)]
        return
    yield from DataLoader(_Reader(source), batch_sampler=list(map(list, indices)), collate_fn=list, num_workers=workers)


def default_workers() -> int:
    """Return how many processes decode pictures beside the network's threads: none on small machines."""
    count = os.cpu_count() or 1
    return 0 if count < 4 else min(8, count // 2)


def extract(
    source: Source,
    extractor: FeatureExtractor,
    taps: Sequence[str],
    *,
    batch_size: int = 64,
    workers: int | None = None,
    skip_bad: bool = False,
    cache: str | Path | None = None,
    progress: Progress | None = None,
) -> FeatureSet:
    """Compute features of all pictures of a source, or take them from the cache.

    Args:
        source: the pictures.
        extractor: network and preparation.
        taps: layers.
        batch_size: pictures at a time.
        workers: decoding processes; chosen by the machine if None.
        skip_bad: leave out pictures that cannot be used and say so, instead of failing.
        cache: folder of the feature files; the user's cache folder if None. "" keeps them until the process ends.
        progress: called with (done, all, seconds) after each batch, in the first process.

    Raises:
        ValueError: for unknown layers, if pictures cannot be used (all are listed), or fewer than two are left.
    """
    for tap in taps:
        choose(tap, extractor.taps, f"layer of {extractor.protocol.network}:")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    if workers is not None and workers < 0:
        raise ValueError(f"workers must be at least 0, got {workers}.")
    rank, world = _processes()
    folder = _folder(source, extractor, skip_bad, cache)
    found = _load(folder, taps, source, extractor) if rank == 0 else None
    missing = _from_first([tap for tap in taps if found is None or tap not in found.arrays])
    if missing:
        with whole_folder(folder) if rank == 0 else tempfile.TemporaryDirectory() as aside:
            job = _Job(source, extractor, missing, batch_size, default_workers() if workers is None else workers, rank, world)
            job.run(Path(aside), skip_bad, progress)
        found = _load(folder, taps, source, extractor) if rank == 0 else None
    if found is None:
        names, labels, conversions, left_out = _from_first(None)
        found = FeatureSet({}, names, labels, conversions, left_out, source.name)
    else:
        _from_first((found.names, found.labels, found.conversions, found.left_out))
    if len(found) < 2:
        raise ValueError(
            f"{source.name!r} has {len(found)} usable picture; an evaluation needs at least 2 (and thousands to mean something)."
        )
    return found


def _folder(source: Source, extractor: FeatureExtractor, skip_bad: bool, cache: str | Path | None) -> Path:
    """Return where the features of a source lie."""
    if cache == "":
        root = _temporary_root()
    else:
        root = (Path(cache).expanduser() if cache is not None else cache_dir()) / "features"
    choices = dataclasses.asdict(extractor.protocol)
    kept = {key: choices[key] for key in ("network", "size", "resize", "value_range")}
    key = json.dumps([source.fingerprint(), kept, extractor.weights, skip_bad], sort_keys=True)
    return root / hashlib.sha256(key.encode()).hexdigest()[:24]


_kept_until_exit: list[tempfile.TemporaryDirectory[str]] = []


def _temporary_root() -> Path:
    """Return a folder that is removed when the process ends."""
    if not _kept_until_exit:
        _kept_until_exit.append(tempfile.TemporaryDirectory(prefix="genkit-features-"))
    return Path(_kept_until_exit[0].name)


def _load(folder: Path, taps: Sequence[str], source: Source, extractor: FeatureExtractor) -> FeatureSet | None:
    """Map the feature files that are there."""
    meta = folder / "meta.json"
    if not meta.is_file():
        return None
    content = json.loads(meta.read_text(encoding="utf-8"))
    arrays = {tap: np.load(folder / f"{tap}.npy", mmap_mode="c") for tap in taps if (folder / f"{tap}.npy").is_file()}
    sources = {tap: extractor.source(tap) for tap in taps}
    return FeatureSet(arrays, content["names"], content["labels"], content["conversions"], content["left_out"], source.name, sources)


class _Job:
    """One pass over a source."""

    def __init__(
        self, source: Source, extractor: FeatureExtractor, taps: Sequence[str], batch_size: int, workers: int, rank: int, world: int
    ) -> None:
        self.source, self.extractor, self.taps, self.workers = source, extractor, taps, workers
        self.rank, self.world, self.count = rank, world, len(source)
        self.batches = [range(i, min(i + batch_size, self.count)) for i in range(0, self.count, batch_size)]
        self.names, self.labels = [""] * self.count, [""] * self.count
        self.conversions: Counter[str] = Counter()
        self.bad: dict[int, str] = {}

    def run(self, folder: Path, skip_bad: bool, progress: Progress | None) -> None:
        """Write the features of usable pictures, in order, and what is known about them."""
        started, arrays = time.perf_counter(), {}
        if self.rank == 0:
            for tap in self.taps:
                shape = (self.count, self.extractor.taps[tap])
                arrays[tap] = np.lib.format.open_memmap(folder / f".{tap}.all", mode="w+", dtype=np.float32, shape=shape)
        mine = self.batches[self.rank :: self.world]
        reader = read_batches(self.source, mine, self.workers)
        done = 0
        for _ in range(-(-len(self.batches) // self.world)):
            rows = self._work(next(reader, []), not self.bad or skip_bad)
            for part in self._gather(rows):
                done += self._store(part, arrays)
            if self.rank == 0 and progress is not None:
                progress(done, self.count, time.perf_counter() - started)
        if self.bad and not skip_bad:
            listed = shorten([self.bad[i] for i in sorted(self.bad)], 20)
            raise ValueError(
                f"{len(self.bad)} of {self.count} pictures of {self.source.name!r} cannot be used: {listed}. --skip-bad goes on without."
            )
        if self.rank == 0:
            self._finish(folder, arrays)

    def _work(self, items: list[tuple[int, Picture | None, str]], compute: bool) -> dict[str, Any]:
        """Return this process's part of a round; once a bad picture is known the rest is only read, to list all of them."""
        good = [(i, picture) for i, picture, _ in items if picture is not None]
        part: dict[str, Any] = {
            "bad": {i: reason for i, picture, reason in items if picture is None},
            "rows": [],
            "facts": [],
            "features": {},
        }
        part["facts"] = [(i, p.name, p.label, p.conversion) for i, p in good]
        if good and compute:
            part["rows"] = [i for i, _ in good]
            part["features"] = {tap: v.numpy() for tap, v in self.extractor([p.pixels for _, p in good], self.taps).items()}
        part["count"] = len(items)
        return part

    def _gather(self, part: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the parts of all processes of a round."""
        if self.world == 1:
            return [part]
        parts: list[dict[str, Any]] = [{} for _ in range(self.world)]
        torch.distributed.all_gather_object(parts, part)
        return parts

    def _store(self, part: dict[str, Any], arrays: dict[str, Any]) -> int:
        """Put a part's rows in their places; return how many pictures it read."""
        self.bad |= part["bad"]
        for i, name, label, conversion in part["facts"]:
            self.names[i], self.labels[i] = name, label
            if conversion:
                self.conversions[conversion] += 1
        for tap, values in part["features"].items():
            if tap in arrays:
                if not np.isfinite(values).all():
                    raise ValueError(f"features of {self.source.name!r} are not finite; check the pictures and the weights.")
                arrays[tap][part["rows"]] = values
        return int(part["count"])

    def _finish(self, folder: Path, arrays: dict[str, Any]) -> None:
        """Leave out bad pictures and write the files that are kept."""
        kept = [i for i in range(self.count) if i not in self.bad]
        for tap, array in arrays.items():
            array.flush()
            out = np.lib.format.open_memmap(folder / f"{tap}.npy", mode="w+", dtype=np.float32, shape=(len(kept), array.shape[1]))
            for start in range(0, len(kept), 4096):
                rows = kept[start : start + 4096]
                out[start : start + len(rows)] = array[rows]
            out.flush()
            (folder / f".{tap}.all").unlink()
        facts = {
            "names": [self.names[i] for i in kept],
            "labels": [self.labels[i] for i in kept],
            "conversions": dict(self.conversions),
            "left_out": [self.bad[i] for i in sorted(self.bad)],
        }
        (folder / "meta.json").write_text(json.dumps(facts), encoding="utf-8")
