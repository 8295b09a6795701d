"""How far pictures are from the real views of a data set, on EfficientNet-Lite0's features (not FID)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from genkit.data.views import ViewDataset
from genkit.eval.assets import bootstrap_mean, reconstruction_features, statistics_of
from genkit.eval.features import FeatureNetwork
from genkit.eval.frechet import frechet_distance
from genkit.tokenizers.quantizers.stats import CodebookStats

SIZE = 64  # pixels: the embedded models' size, and the judging network's
SOURCE = f"efficientnet-lite0 at {SIZE} px"


class ViewJudge:
    """Frechet distances to some views of a data set.

    Args:
        path: parquet file.
        wanted: views of the reference; all if None.

    Attributes:
        views: the data set.
        count: pictures of the reference.
    """

    def __init__(self, path: str, wanted: Sequence[int] | None = None) -> None:
        self.network, self.views = FeatureNetwork("efficientnet-lite0", size=SIZE), ViewDataset(path, SIZE)
        rows = self.views.rows_of(wanted)
        self.count = len(rows)
        real = [self.network.features(torch.stack([self.views[i]["image"] for i in rows[k : k + 64]])) for k in range(0, len(rows), 64)]
        self.reference = statistics_of(torch.cat(real), SOURCE)

    @torch.no_grad()
    def distance(self, pictures: Callable[[range], Tensor], count: int, batch_size: int = 62) -> float:
        """Return the distance of pictures 0 .. count - 1; `pictures` gives those of some numbers, [b, 3, h, w] in [-1, 1]."""
        chosen = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
        return frechet_distance(self.reference, statistics_of(torch.cat([self.network.features(pictures(c)) for c in chosen]), SOURCE))


def tokenizer_figures(model: Any, train: str, test: str) -> dict[str, Any]:
    """Return how a tokenizer does: codes used and distance on training views, PSNR and SSIM (95 %, over objects) on test views."""
    network = FeatureNetwork("efficientnet-lite0", size=SIZE)

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        out = model(x)
        return out.sample, out.indices

    real, fake, codes, *_ = reconstruction_features(network, ViewDataset(train, SIZE), reconstruct)
    stats = CodebookStats(model.quantizer.codebook_size)
    stats.update(codes)
    views = ViewDataset(test, SIZE)
    *_, psnr, ssim = reconstruction_features(network, views, reconstruct)
    objects = [views.object_of(i) for i in range(len(views))]
    return {
        "codes": model.quantizer.codebook_size, **{key: stats.compute()[key] for key in ("utilisation", "perplexity")},
        "psnr": bootstrap_mean(psnr, objects), "ssim": bootstrap_mean(ssim, objects),
        "distance": frechet_distance(statistics_of(real, SOURCE), statistics_of(fake, SOURCE)),
    }  # fmt: skip
