"""Metrics on CLIP embeddings: CMMD between pictures, CLIP score between pictures and texts.

Any CLIP of transformers serves, by folder or hub id; published CMMD figures use openai/clip-vit-large-patch14-336. Pictures are cropped to
the middle square, resized with Pillow's bicubic filter to 8 bits and normalised as the model was trained.

Source: Jayasumana et al. 2024 (arXiv 2401.09603); Hessel et al. 2021 (arXiv 2104.08718).
Letters: n pictures, p embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genkit.eval import kernels, similarity
from genkit.eval.extract import FeatureSet
from genkit.eval.metrics import GROUPS, NORMAL, QUANTILE, Result, jackknife_rows
from genkit.eval.protocols import Protocol
from genkit.eval.resize import resize

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of OpenAI's CLIP
MOST = 10_000  # samples of each set that CMMD looks at: its kernel is n x m


class ClipExtractor:
    """A CLIP model behind its preparation of pictures, for `genkit.eval.extract.extract` with the tap "image".

    Args:
        model: folder or hub id with a CLIPModel and its tokenizer.
        device: where to compute.

    Raises:
        OSError: if the model cannot be opened.
    """

    def __init__(self, model: str | Path, device: str | torch.device = "cpu") -> None:
        from transformers import AutoTokenizer, CLIPModel

        self.device = torch.device(device)
        try:
            self.model = CLIPModel.from_pretrained(str(model)).eval().requires_grad_(False).to(self.device)
            self.tokenizer = AutoTokenizer.from_pretrained(str(model))
        except OSError as error:
            raise OSError(
                f"the CLIP {str(model)!r} cannot be opened: it is no folder with a CLIP of transformers, nor a hub id that can be reached "
                f"({str(error).splitlines()[0]})"
            ) from error
        size = int(self.model.config.vision_config.image_size)
        self.taps, self.weights = {"image": int(self.model.config.projection_dim)}, str(model)
        self.protocol = Protocol("clip", network=f"clip {model}", size=size, resize="pil-bicubic", value_range="unit", tap="image")

    def source(self, tap: str) -> str:
        """Return what the embeddings are."""
        return f"{self.protocol.network}, middle square, {self.protocol.resize} to {self.protocol.size}"

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[np.ndarray[Any, Any]], taps: Iterable[str]) -> dict[str, Tensor]:
        """Embed pictures [h, w, 3] uint8 of any sizes: {"image": [n, p]} float32 on the CPU, not normalised."""
        squares = [torch.from_numpy(_middle_square(picture)).permute(2, 0, 1)[None] for picture in pictures]
        pixels = torch.cat([resize(square, self.protocol.size, self.protocol.resize) for square in squares]).to(self.device) / 255
        mean, std = (torch.tensor(values, device=self.device)[:, None, None] for values in (MEAN, STD))
        vision = self.model.vision_model(pixel_values=(pixels - mean) / std)
        return {"image": self.model.visual_projection(vision.pooler_output).float().cpu()}

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Embed texts: [n, p] float32 on the CPU; texts beyond the model's length are cut."""
        parts = []
        for start in range(0, len(texts), batch_size):
            part = list(texts[start : start + batch_size])
            tokens = self.tokenizer(part, padding=True, truncation=True, return_tensors="pt").to(self.device)
            found = self.model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
            parts.append(self.model.text_projection(found.pooler_output).float().cpu())
        return torch.cat(parts)


def _middle_square(picture: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    side = min(picture.shape[:2])
    top, left = (picture.shape[0] - side) // 2, (picture.shape[1] - side) // 2
    return np.ascontiguousarray(picture[top : top + side, left : left + side])


def cmmd(real: FeatureSet, fake: FeatureSet, extractor: ClipExtractor, intervals: bool = True) -> Result:
    """Compute CMMD of embeddings, with a jackknife over ten groups of generated samples."""
    x, y = real.tensor("image")[:MOST], fake.tensor("image")[:MOST]
    value, interval = kernels.cmmd(x, y), None
    if intervals and len(y) >= 2 * GROUPS:
        reach = QUANTILE * math.sqrt(jackknife_rows(y, lambda rest: kernels.cmmd(x, rest)))
        interval = (value - reach, value + reach)
    notes = (f"the first {MOST:,} samples of each set",) if max(len(real), len(fake)) > MOST else ()
    return Result("cmmd", value, interval, extractor.protocol, len(real), len(fake), real.source, fake.source, extractor.weights, notes)


def clip_score(fake: FeatureSet, texts: Sequence[str], extractor: ClipExtractor) -> Result:
    """Compute 100 times the mean cosine of each picture and its text, cut at 0.

    Args:
        fake: embeddings of pictures.
        texts: one per picture.
        extractor: of both.

    Raises:
        ValueError: if there is not one text per picture, or a text is empty.
    """
    if len(texts) != len(fake) or not all(texts):
        raise ValueError(f"clip-score needs one text per picture, got {sum(map(bool, texts))} texts for {len(fake)} pictures.")
    distinct = sorted(set(texts))
    embedded = dict(zip(distinct, extractor.embed_texts(distinct), strict=True))
    cosines = similarity.cosines(fake.tensor("image"), torch.stack([embedded[text] for text in texts]))
    value, reach = max(100 * float(cosines.mean()), 0.0), 100 * NORMAL * float(cosines.std()) / math.sqrt(len(cosines))
    interval = (value - reach, value + reach)
    return Result("clip-score", value, interval, extractor.protocol, 0, len(fake), "", fake.source, extractor.weights)
