"""Opening image tokenizers by name, of a pipeline or in a folder or repository of their own, and writing the codes of whole data sets."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from filelock import FileLock
from torch import Tensor

from genkit.catalogue import INDEX, packaged_names
from genkit.checks import choose
from genkit.data.images import ImageFolderDataset
from genkit.data.tokens import TokenCache, TokenMeta, build_cache
from genkit.data.views import ViewDataset
from genkit.pipelines.base import GenPipeline
from genkit.tokenizers.conv_vqgan import ConvVQModel
from genkit.tokenizers.vit_vqgan import ViTVQModel
from genkit.tokenizers.vq_model import VQModel
from genkit.weights import weights_hash

CLASSES: dict[str, type[VQModel]] = {"ConvVQModel": ConvVQModel, "ViTVQModel": ViTVQModel}


def is_pipeline(name: str) -> bool:
    """Tell whether a name is a packaged model's or a pipeline folder."""
    return name in packaged_names() or (Path(name) / INDEX).is_file()


def load_tokenizer(name: str) -> VQModel:
    """Return an image tokenizer in eval mode.

    Args:
        name: packaged model or pipeline folder, whose `vqvae` is taken; or folder or hub id of a tokenizer.

    Raises:
        OSError: if there is nothing of that name.
        ValueError: if it is something else.
    """
    if is_pipeline(name):
        found = getattr(GenPipeline.from_pretrained(name), "vqvae", None)
        if found is None:
            raise ValueError(f"{name!r} has no image tokenizer.")
        return cast(VQModel, found)
    config: Any = VQModel.load_config(name)
    cls = CLASSES[choose(str(config.get("_class_name")), CLASSES, f"class of image tokenizer in {name!r}")]
    return cast(VQModel, cls.from_pretrained(name)).eval()


class DataTokens:
    """The codes of a data set's pictures: what they are made from, where trainings look for them, and the job that writes them.

    Args:
        model: the tokenizer.
        data: the pictures, of one size.
        flip: also those of the mirrored pictures, behind the others.
        tile: side of the tiles in pixels, see `VQModel.tiled_encode`; None encodes whole pictures.

    Raises:
        ValueError: if the patch does not divide the pictures' side.
    """

    def __init__(self, model: VQModel, data: ViewDataset | ImageFolderDataset, flip: bool = False, tile: int | None = None) -> None:
        self.model, self.data, self.flip, self.tile = model, data, flip, tile
        self.meta = TokenMeta(
            rows=len(data) * (2 if flip else 1),
            grid=model.grid_for(data.size, data.size),
            codebook_size=model.quantizer.codebook_size,
            data_hash=data.data_hash,
            tokenizer_hash=weights_hash(model) + ("" if tile is None else f"-tiles-{tile}"),
        )

    def folder(self, cache: Path) -> Path:
        """Return the folder of the codes in a cache folder."""
        return cache / f"tokens-{self.meta.data_hash}-{self.meta.tokenizer_hash}{'-flip' if self.flip else ''}"

    @torch.no_grad()
    def encode(self, rows: range) -> Tensor:
        """Return the codes [b, n] of rows; those behind the last picture are the mirrored ones."""
        count, device = len(self.data), next(self.model.parameters()).device
        pictures = torch.stack([self.data[row % count]["image"].flip(-1) if row >= count else self.data[row]["image"] for row in rows])
        pictures = pictures.to(device)
        out = self.model.encode(pictures) if self.tile is None else self.model.tiled_encode(pictures, self.tile)
        return out.indices.flatten(1)

    def write(self, folder: Path, batch_size: int = 128, progress: Callable[[int, int, float], None] | None = None) -> TokenCache:
        """Write the codes, going on where an earlier call was stopped; where several processes ask, one writes and the others wait.

        Args:
            folder: of the codes; created if needed.
            batch_size: pictures at a time.
            progress: called with rows done, rows in all and seconds so far, after each batch.

        Raises:
            ValueError: if the folder holds the codes of something else.
        """
        began = time.perf_counter()

        def encode(rows: range) -> Tensor:
            codes = self.encode(rows)
            if progress is not None:
                progress(rows.stop, self.meta.rows, time.perf_counter() - began)
            return codes

        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            return build_cache(folder, self.meta, encode, batch_size)
