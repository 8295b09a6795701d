"""What a person hands to an image pipeline, turned into what networks take: class names, pictures with a mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from genkit.checks import unknown

Prompt = str | int
Picture = Image.Image | Tensor | np.ndarray[Any, Any]


def as_prompts(prompt: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Return prompts as a list.

    Raises:
        ValueError: for an empty list.
        TypeError: for anything but text and ints.
    """
    prompts = [prompt] if isinstance(prompt, str | int) else prompt
    if not isinstance(prompts, Sequence) or any(not isinstance(p, str | int) or isinstance(p, bool) for p in prompts):
        raise TypeError(f"prompt must be text, a class id or a list of these, got {prompt!r}.")
    if not prompts:
        raise ValueError("prompt is an empty list; give at least one text, class name or class id.")
    return list(prompts)


def names_of_classes(id2label: Mapping[Any, str]) -> dict[str, int]:
    """Return class ids by lower-case name; a label such as `tench, Tinca tinca` gives several names."""
    names: dict[str, int] = {}
    for key, label in id2label.items():
        for name in [label, *label.split(",")]:
            names.setdefault(name.strip().lower(), int(key))
    return names


def class_id(prompt: Prompt, names: Mapping[str, int], num_classes: int) -> int:
    """Return the class that a prompt means: an id, a known name, or an id as text.

    Args:
        prompt: what was given.
        names: class ids by lower-case name.
        num_classes: ids lie in 0 .. num_classes - 1.

    Raises:
        ValueError: for an unknown name, with the nearest, or an id out of range.
    """
    if isinstance(prompt, str):
        known = names.get(prompt.strip().lower())
        if known is not None:
            return known
        if not prompt.strip().isdigit():
            hint = "" if names else f" This model has no class names; give an id in 0 .. {num_classes - 1}."
            raise ValueError(unknown(prompt, names, "class") + hint)
        prompt = int(prompt)
    if not 0 <= prompt < num_classes:
        raise ValueError(f"class id must lie in 0 .. {num_classes - 1}, got {prompt}.")
    return prompt


def resolve_prompts(prompts: Sequence[Prompt], id2label: Mapping[Any, str] | None, num_classes: int | None) -> list[Prompt]:
    """Return what prompts mean to a model: class ids, or texts.

    Args:
        prompts: texts, class names or class ids.
        id2label: class names by id; a text model takes their ids too.
        num_classes: of a class model; None for a text model.

    Raises:
        ValueError: for unknown classes, naming the nearest, and for ids that a text model has no name for.
    """
    labels = id2label or {}
    if num_classes is not None:
        names = names_of_classes(labels)
        return [class_id(prompt, names, num_classes) for prompt in prompts]
    by_id = {int(key): label for key, label in labels.items()}
    for prompt in prompts:
        if isinstance(prompt, int) and prompt not in by_id:
            raise ValueError(
                f"this model takes text, got class id {prompt}"
                + (f"; it knows 0 .. {len(by_id) - 1}." if by_id else "; describe the picture in words.")
            )
    return [by_id[prompt] if isinstance(prompt, int) else prompt for prompt in prompts]


def picture_tensor(image: Picture, size: tuple[int, int], name: str = "image") -> Tensor:
    """Return a picture as [1, 3, h, w] or pictures as [b, 3, h, w] in [-1, 1].

    Args:
        image: PIL image, array [h, w, 3] in [0, 1] or of bytes, or tensor [3, h, w] or [b, 3, h, w] in [-1, 1].
        size: (h, w) that the model takes.
        name: of the argument, for messages.

    Raises:
        ValueError: for another size.
        TypeError: for anything else.
    """
    if isinstance(image, Image.Image):
        image = np.asarray(image.convert("RGB"))
    if isinstance(image, np.ndarray):
        scale = 255 if image.dtype == np.uint8 else 1
        tensor = torch.from_numpy(image.astype(np.float32) / scale).movedim(-1, -3) * 2 - 1
    elif isinstance(image, Tensor):
        tensor = image
    else:
        raise TypeError(f"{name} must be a PIL image, an array or a tensor, got {type(image).__name__}.")
    tensor = tensor[None] if tensor.ndim == 3 else tensor
    if tensor.ndim != 4 or tuple(tensor.shape[1:]) != (3, *size):
        raise ValueError(
            f"{name} must be {size[1]} pixels wide and {size[0]} high with 3 channels, got {list(tensor.shape)}; resize it first."
        )
    return tensor


def repaint_mask(mask: Picture, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Return which tokens a drawn mask repaints: those with a white pixel in their patch.

    Args:
        mask: white = repaint; PIL image, array [h, w] or tensor [h, w], [1, h, w] or [b, 1, h, w], in [0, 1] or bytes.
        size: (h, w) of the picture.
        grid: (rows, columns) of tokens.

    Returns:
        [b, rows * columns] bool.

    Raises:
        ValueError: for another size, or if nothing is white.
        TypeError: for anything else.
    """
    if isinstance(mask, Image.Image):
        mask = np.asarray(mask.convert("L"))
    if not isinstance(mask, Tensor | np.ndarray):
        raise TypeError(f"mask_image must be a PIL image, an array or a tensor, got {type(mask).__name__}.")
    tensor = torch.as_tensor(np.array(mask) if isinstance(mask, np.ndarray) else mask)
    tensor = tensor.float() / 255 if tensor.dtype == torch.uint8 else tensor.float()
    tensor = tensor.reshape(-1, 1, *tensor.shape[-2:])
    if tuple(tensor.shape[-2:]) != size:
        raise ValueError(
            f"mask_image must be {size[1]} pixels wide and {size[0]} high like the picture, got {list(tensor.shape[-2:])}; resize it first."
        )
    white = F.max_pool2d((tensor > 0.5).float(), (size[0] // grid[0], size[1] // grid[1])).flatten(1) > 0
    if not bool(white.any(dim=1).all()):
        raise ValueError("mask_image has no white pixel: white marks what is repainted, so there is nothing to do.")
    return white
