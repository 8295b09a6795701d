"""Opening image tokenizers by name: of a pipeline, or in a folder or repository of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from genkit.catalogue import INDEX, packaged_names
from genkit.checks import choose
from genkit.pipelines.base import GenPipeline
from genkit.tokenizers.conv_vqgan import ConvVQModel
from genkit.tokenizers.vit_vqgan import ViTVQModel
from genkit.tokenizers.vq_model import VQModel

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
