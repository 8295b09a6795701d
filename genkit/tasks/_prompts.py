"""Conditions of pictures: captions, prompts, chosen views, and text-encoder outputs of a few prompts per picture, computed once and
memory-mapped, so that training never runs the text encoder.

Letters: u distinct texts, m text tokens, d width of a text token, p width of the pooled text, v pictures, k prompts per picture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn

from genkit.conditioners.text import EncodedText, encode_text, warn_of_long
from genkit.data.images import ImageFolderDataset
from genkit.data.prompts import PromptBuilder
from genkit.data.views import ViewDataset
from genkit.paths import whole_folder
from genkit.weights import weights_hash

FILES = ("tokens", "mask", "pooled", "rows")


def captions_of(data: ViewDataset | ImageFolderDataset) -> list[str]:
    """Return the caption of every picture."""
    if isinstance(data, ViewDataset):
        return [data.captions[data.object_of(i)] for i in range(len(data))]
    return list(data.captions)


def prompts_of(data: ViewDataset | ImageFolderDataset, per_picture: int) -> list[tuple[str, ...]]:
    """Return prompts for every picture: of views the plain one and random ones, of other pictures their caption.

    Args:
        data: pictures.
        per_picture: k of views, at least 1.
    """
    if not isinstance(data, ViewDataset):
        return [(caption,) for caption in data.captions]
    builder, prompts = PromptBuilder.from_views(data), []
    for i in range(len(data)):
        thing, view = data.object_of(i), data.view_of(i)
        drawn = [builder.build(thing, view, i * per_picture + k) for k in range(1, per_picture)]
        prompts.append((builder.plain(thing), *drawn))
    return prompts


def rows_of_views(data: ViewDataset | ImageFolderDataset, views: Sequence[int] | None, source: str) -> list[int]:
    """Return the pictures that show one of some turntable views; all of them if None.

    Args:
        data: pictures.
        views: numbers of views, 0 is the front.
        source: of the data, for messages.

    Raises:
        ValueError: if the data has no views, or there is no such view.
    """
    if isinstance(data, ViewDataset):
        return data.rows_of(views)
    if views is not None:
        raise ValueError(f"views={list(views)} choose turntable views, but {source} holds single pictures; leave it out.")
    return list(range(len(data)))


def load_text(text_encoder: str | None, tokenizer: str | None) -> tuple[nn.Module, Any] | None:
    """Load a CLIP text model with projection, frozen, and its tokenizer; None if neither is named.

    Args:
        text_encoder, tokenizer: folders or hub ids.
    """
    if text_encoder is None or tokenizer is None:
        return None
    from transformers import AutoTokenizer, CLIPTextModelWithProjection

    encoder = CLIPTextModelWithProjection.from_pretrained(text_encoder, torch_dtype=torch.float32)
    return encoder.eval().requires_grad_(False), AutoTokenizer.from_pretrained(tokenizer)


class PromptTable:
    """Encoded prompts of every picture; text 0 is the empty prompt.

    Args:
        path: folder that `build_prompt_table` wrote.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        arrays: dict[str, np.ndarray[Any, Any]] = {name: np.load(path / f"{name}.npy", mmap_mode="r") for name in FILES}
        self.tokens, self.mask, self.pooled, self.rows = (arrays[name] for name in FILES)

    def pick(self, index: Tensor, uniforms: Tensor, is_empty: Tensor) -> dict[str, Tensor]:
        """Return one encoded prompt per picture, as `prepare_condition` takes it, on the CPU.

        Args:
            index: [b] int64, pictures.
            uniforms: [b] in [0, 1), choose among each picture's prompts.
            is_empty: [b] bool, take the empty prompt instead.
        """
        choice = (uniforms.double() * self.rows.shape[1]).long().clamp_max(self.rows.shape[1] - 1)
        texts = np.where(is_empty.cpu().numpy(), 0, self.rows[index.cpu().numpy(), choice.cpu().numpy()])
        found = {"text": self.tokens[texts], "text_mask": self.mask[texts], "pooled": self.pooled[texts]}
        return {
            name: torch.from_numpy(np.array(value)).to(torch.bool if name == "text_mask" else torch.float32)
            for name, value in found.items()
        }


def text_table(folder: Path, prompts: Sequence[Sequence[str]], tokenizer: Any, encoder: nn.Module) -> PromptTable:
    """Return the table of prompts under a text encoder, encoding them if it is not there yet."""
    warn_of_long(list(dict.fromkeys(text for row in prompts for text in row)), tokenizer)
    key = f"{weights_hash(encoder)}:{tokenizer.backend_tokenizer.to_str()}:{tokenizer.model_max_length}"
    return build_prompt_table(folder, prompts, key, lambda texts: encode_text(texts, tokenizer, encoder, warn=False))


def build_prompt_table(
    folder: Path, prompts: Sequence[Sequence[str]], encoder_hash: str, encode: Callable[[list[str]], EncodedText], batch_size: int = 256
) -> PromptTable:
    """Return the table of some prompts, encoding them if it is not there yet; other processes wait for the one that writes.

    Args:
        folder: of the caches; created if needed.
        prompts: k texts for each of v pictures.
        encoder_hash: changes with the text encoder.
        encode: texts -> their encoding, all of one length m.
        batch_size: texts per call of `encode`.
    """
    digest = hashlib.sha256(f"prompts-v1:{encoder_hash}".encode())
    for row in prompts:
        digest.update("\n".join((*row, "")).encode())
    path = folder / f"prompts-{digest.hexdigest()[:24]}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.is_dir():
            with whole_folder(path) as aside:
                _write(aside, prompts, encode, batch_size)
    return PromptTable(path)


@torch.no_grad()
def _write(folder: Path, prompts: Sequence[Sequence[str]], encode: Callable[[list[str]], EncodedText], batch_size: int) -> None:
    """Encode each distinct text once and write the four arrays."""
    texts = {text: row for row, text in enumerate(dict.fromkeys(["", *(text for row in prompts for text in row)]))}
    np.save(folder / "rows.npy", np.array([[texts[text] for text in row] for row in prompts], dtype=np.int32))
    listed, arrays = list(texts), {}
    for start in range(0, len(listed), batch_size):
        encoded = encode(listed[start : start + batch_size])
        parts = {"tokens": encoded.tokens.half(), "mask": encoded.mask, "pooled": encoded.pooled.half()}
        for name, part in parts.items():
            values = part.cpu().numpy()
            if name not in arrays:
                file = folder / f"{name}.npy"
                arrays[name] = np.lib.format.open_memmap(file, mode="w+", dtype=values.dtype, shape=(len(listed), *values.shape[1:]))
            arrays[name][start : start + len(values)] = values
    for array in arrays.values():
        array.flush()
