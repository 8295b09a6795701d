"""Reference statistics in the files of the tools: read safely, write so that others can read them.

| file | content |
|---|---|
| `.npz` of pytorch-fid, EDM, clean-fid | mu [d], sigma [d, d] |
| `.npz` of ADM (VIRTUAL_...) | the same, mu_s and sigma_s of the spatial features, pictures under arr_0 |
| `.npz` of genkit | mu, sigma, count, source (what the features are), protocol, data |
| `.pt` of torch-fidelity, `.pkl` of EDM2 | pickled dicts of numpy arrays, read with an allow-list: no code runs |
| `.pkl` of StyleGAN | sums of features and of their products |

A covariance must be finite and symmetric; everything else is an error.

Letters: d features.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genkit.checks import shorten
from genkit.eval.frechet import GaussianStatistics

SUFFIXES = (".npz", ".pkl", ".pickle", ".pt")
# What a pickle of numpy arrays is made of; anything else in a file is refused.
ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype"),
    ("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar"), ("collections", "OrderedDict"), ("_codecs", "encode"),
    ("numpy._core.numeric", "_frombuffer"), ("numpy.core.numeric", "_frombuffer"),
}  # fmt: skip
KEYS = {"mean": {"pool": "mu", "spatial": "mu_s"}, "covariance": {"pool": "sigma", "spatial": "sigma_s"}}


class _Unpickler(pickle.Unpickler):
    """A reader of numpy arrays in plain containers."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is no array")
        return super().find_class(module, name)


def is_statistics(path: str | Path) -> bool:
    """Tell whether a file holds statistics rather than pictures: a pickle, or an npz with `mu`."""
    path = Path(path).expanduser()
    if not path.is_file() or path.suffix not in SUFFIXES:
        return False
    if path.suffix != ".npz":
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            return "mu.npy" in archive.namelist()
    except zipfile.BadZipFile:
        return False


def read_statistics(path: str | Path, layer: str = "pool") -> GaussianStatistics:
    """Read reference statistics.

    Args:
        path: file of one of the tools.
        layer: "pool" for FID, "spatial" for sFID (ADM's files).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is none of the known formats, or mean and covariance are not what they should be.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"statistics file {str(path)!r} does not exist.")
    content = _read_npz(path, layer) if path.suffix == ".npz" else _read_pickle(path)
    if "raw_mean" in content:
        return _from_sums(content, path)
    names = [KEYS[part][layer] for part in ("mean", "covariance")] if layer == "spatial" else ["mu", "sigma"]
    missing = [name for name in names if name not in content]
    if missing:
        raise ValueError(f"{str(path)!r} lacks {shorten(missing)}; it has {shorten(sorted(content))}.")
    mean, covariance = (np.asarray(content[name], dtype=np.float64) for name in names)
    check_moments(mean, covariance, path)
    return GaussianStatistics.of_moments(
        torch.from_numpy(mean), torch.from_numpy(covariance), int(content.get("count", 0)), str(content.get("source", ""))
    )


def check_moments(mean: np.ndarray[Any, Any], covariance: np.ndarray[Any, Any], path: Path) -> None:
    """Refuse moments that are misshapen, not finite or not symmetric.

    Raises:
        ValueError: naming the file and what is wrong.
    """
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"{str(path)!r}: expected a mean [d] and a covariance [d, d], got {list(mean.shape)} and {list(covariance.shape)}."
        )
    if not np.isfinite(mean).all() or not np.isfinite(covariance).all():
        raise ValueError(f"{str(path)!r}: mean or covariance hold NaN or infinity; compute the statistics again.")
    scale = np.abs(covariance).max()
    if np.abs(covariance - covariance.T).max() > 1e-4 * max(scale, 1e-300):
        raise ValueError(f"{str(path)!r}: the covariance is not symmetric; the file is damaged or no covariance.")


def _read_npz(path: Path, layer: str) -> dict[str, Any]:
    wanted = {"mu", "sigma", "mu_s", "sigma_s", "count", "source"} - ({"mu", "sigma"} if layer == "spatial" else {"mu_s", "sigma_s"})
    try:
        with np.load(path, allow_pickle=False) as file:
            content = {name: file[name] for name in wanted & set(file.files)}
            return content or dict.fromkeys(file.files)
    except (zipfile.BadZipFile, ValueError, OSError, EOFError) as error:
        raise ValueError(f"{str(path)!r} is no readable npz file ({error}).") from error


def _read_pickle(path: Path) -> dict[str, Any]:
    """Read a pickle, or a torch zip that holds one, without running what is in it."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                member = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                with archive.open(member) as file:
                    content = _Unpickler(file).load()
        else:
            with path.open("rb") as file:
                content = _Unpickler(file).load()
    except (
        pickle.UnpicklingError,
        EOFError,
        StopIteration,
        AttributeError,
        ImportError,
        IndexError,
        KeyError,
        TypeError,
        ValueError,
    ) as error:
        raise ValueError(f"{str(path)!r} cannot be read safely ({error}); expected numpy arrays mu and sigma. Save them as npz.") from error
    if isinstance(content, dict) and isinstance(content.get("fid"), dict):
        content = content["fid"]  # EDM2: one entry per metric
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} holds a {type(content).__name__}, expected a dict with mu and sigma.")
    return content


def _from_sums(content: dict[str, Any], path: Path) -> GaussianStatistics:
    """Return the statistics of StyleGAN's file: sums of features and of products."""
    count = int(content.get("num_items", 0))
    if count < 2:
        raise ValueError(f"{str(path)!r}: num_items must be at least 2, got {count}.")
    mean = np.asarray(content["raw_mean"], dtype=np.float64) / count
    scatter = np.asarray(content["raw_cov"], dtype=np.float64) - count * np.outer(mean, mean)
    covariance = scatter / (count - 1)
    check_moments(mean, covariance, path)
    return GaussianStatistics.of_moments(torch.from_numpy(mean), torch.from_numpy(covariance), count, "")
