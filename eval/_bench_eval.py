"""The evaluator: the Frechet distance against scipy's matrix root, Inception's features against the plain loop."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import torch
from _timing import machine, report, timed
from PIL import Image
from torch import Tensor

from genkit.eval.extract import read_batches
from genkit.eval.frechet import GaussianStatistics, frechet_distance
from genkit.eval.inception import SIZE, STAGES, InceptionV3
from genkit.eval.pictures import Picture, open_source
from genkit.eval.resize import resize


def frechet(dim: int = 2048, samples: int = 5000, threads: int = 0, repeats: int = 3) -> None:
    """Time the Frechet distance from statistics: scipy's matrix root and general eigenvalues, as the tools do, against ours, in fp64.

    Args:
        dim: features.
        samples: of each set; fewer than features make the covariances singular.
        threads: CPU threads; 0 leaves PyTorch's choice.
        repeats: timed runs of each way.
    """
    import scipy.linalg

    if threads:
        torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    spread = (1 + torch.arange(dim)) ** -0.2
    sets = []
    for shift in (0.0, 0.1):
        stats = GaussianStatistics(dim)
        stats.update((torch.randn(samples, dim, generator=generator) * spread + shift).relu())
        sets.append(stats)
    (m1, s1), (m2, s2) = ((mean.numpy(), covariance.numpy()) for mean, covariance in (stats.compute() for stats in sets))

    def with_root(trace: float) -> Tensor:
        return torch.tensor([((m1 - m2) ** 2).sum() + s1.trace() + s2.trace() - 2 * trace])

    def by_root() -> Tensor:
        return with_root(float(np.trace(scipy.linalg.sqrtm(s1 @ s2).real)))

    def by_eigenvalues() -> Tensor:
        return with_root(float(np.sqrt(np.linalg.eigvals(s1 @ s2).astype(complex)).real.sum()))

    print(machine("cpu"))
    print(f"Frechet distance, {dim} features, {samples} samples of each set, float64")
    ways = {"scipy sqrtm": by_root, "numpy eigvals": by_eigenvalues, "genkit": lambda: torch.tensor([frechet_distance(*sets)])}
    timings = timed(ways, repeats, "cpu")
    report(timings, 1, "distances")
    exact, ours = (float(cast(Tensor, timings[name].result)) for name in ("scipy sqrtm", "genkit"))
    print(f"genkit {ours:.9g}, relative difference to scipy {abs(ours - exact) / exact:.1g}")


def inception(
    batch: int = 16, side: int = 256, files: int = 0, workers: int = 1, device: str = "cpu", threads: int = 0, repeats: int = 3
) -> None:
    """Time pooled FID features of 8-bit pictures: batch norm and convolution apart, NCHW, resize by indexing, against ours, in fp32.

    The weights are random: they do not change the speed.

    Args:
        batch: pictures at once.
        files: write that many PNG files and read them in both ways, ours in workers; 0 times the features of one batch in memory.
        workers: of our way.
        side: of the pictures, in pixels.
        device: cpu, cuda or mps.
        threads: CPU threads; 0 leaves PyTorch's choice.
        repeats: timed runs of each way.
    """
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    weights = {
        key: torch.randn(value.shape) / max(value[0].numel(), 1) ** 0.5 for key, value in InceptionV3.expected().items() if value.ndim > 1
    }
    for key, value in InceptionV3.expected().items():
        if value.ndim == 1:
            weights[key] = torch.zeros(value.shape) if key.endswith(("bias", "running_mean")) else torch.ones(value.shape)
    plain = InceptionV3.unfolded(weights).to(device)
    ours = InceptionV3(weights).to(device)
    pictures = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, device=device)

    def resize_by_indexing(x: Tensor) -> Tensor:
        place = torch.arange(SIZE, device=device) * (side / SIZE)
        low = place.floor().long()
        high, weight = (low + 1).clamp_max(side - 1), place - low
        x = x[..., low] + (x[..., high] - x[..., low]) * weight
        return x[..., low, :] + (x[..., high, :] - x[..., low, :]) * weight[:, None]

    @torch.inference_mode()
    def plain_features(pictures: Tensor = pictures) -> Tensor:
        x = (resize_by_indexing(pictures.float()) - 128) / 128
        for stage in STAGES:
            x = plain.get_submodule(stage)(x)
        return x.mean((2, 3))

    @torch.inference_mode()
    def features(pictures: Tensor = pictures) -> Tensor:
        return ours((resize(pictures, SIZE, "tf1") - 128) / 128)["2048"]

    print(machine(device))
    print(f"FID Inception features, {files or batch} pictures of {side}x{side}, float32, {device}")
    if not files:
        report(timed({"plain loop": plain_features, "genkit": features}, repeats, device), batch, "pictures")
        return
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for i in range(files):  # smooth pictures: noise would make decoding slower than real ones are
            coarse = Image.fromarray(rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
            coarse.resize((side, side), Image.Resampling.BICUBIC).save(Path(folder) / f"{i:05d}.png")
        source = open_source(folder)
        indices = [range(i, min(i + batch, files)) for i in range(0, files, batch)]

        def over_files(compute: Callable[[Tensor], Tensor], processes: int) -> Tensor:
            parts = []
            for items in read_batches(source, indices, processes):
                stacked = torch.from_numpy(np.stack([cast(Picture, picture).pixels for _, picture, _ in items]))
                parts.append(compute(stacked.permute(0, 3, 1, 2).to(device)))
            return torch.cat(parts)

        ways = {"plain loop": lambda: over_files(plain_features, 0), "genkit": lambda: over_files(features, workers)}
        report(timed(ways, repeats, device), files, "pictures")
