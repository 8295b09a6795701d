"""Checks of what a user hands in, with errors that say what, expected, received and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch costs a second to import; errors about arguments must not wait for it
    from torch import Tensor


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """Return the choice that is spelled most like `name`, or None if none is close."""
    lookup = {choice.lower(): choice for choice in choices}
    found = difflib.get_close_matches(str(name).lower(), lookup, n=1, cutoff=0.5)
    return lookup[found[0]] if found else None


def unknown(name: object, choices: Iterable[str], what: str) -> str:
    """Return the text of an unknown-name error: what was given, the nearest choice and the list."""
    listed = sorted(choices)
    close = nearest(str(name), listed)
    hint = f" Did you mean {close!r}?" if close else ""
    shown = ", ".join(listed[:30]) + (f", ... ({len(listed)} in all)" if len(listed) > 30 else "")
    return f"unknown {what} {name!r}.{hint} Known: {shown or 'none'}."


def choose(name: str, choices: Iterable[str], what: str) -> str:
    """Return `name` if it is one of `choices`.

    Args:
        name: what was given.
        choices: accepted names.
        what: what is being named, for the message ("quantizer", "optimizer").

    Raises:
        ValueError: if the name is not accepted; names the nearest choice and lists all.
    """
    choices = list(choices)
    if name not in choices:
        raise ValueError(unknown(name, choices, what))
    return name


def shorten(names: Sequence[str], most: int = 10) -> str:
    """Return names as a list in words: the first `most`, and how many there are in all."""
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")


def tell_differences(missing: Sequence[str], unexpected: Sequence[str], misshapen: Sequence[str]) -> str:
    """Return what differs between a checkpoint and a model, or "" if nothing does.

    Args:
        missing: keys of the model that the checkpoint lacks.
        unexpected: keys of the checkpoint that the model lacks.
        misshapen: keys with both shapes, as `misshapen_keys` tells them.
    """
    kinds = (("missing", missing), ("unexpected", unexpected), ("of the wrong shape", misshapen))
    return "; ".join(f"{len(keys)} {kind}: {shorten(sorted(keys))}" for kind, keys in kinds if keys)


def misshapen_keys(expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]]) -> list[str]:
    """Return the common keys whose shapes differ, each with both shapes."""
    common = sorted(expected.keys() & found.keys())
    pairs = [(key, list(expected[key]), list(found[key])) for key in common]
    return [f"{key} expected {wanted}, found {given}" for key, wanted, given in pairs if wanted != given]


def check_shape(tensor: Tensor, name: str, pattern: str, **sizes: int) -> dict[str, int]:
    """Check a tensor's axes against a pattern such as `b n d` and return the sizes by letter.

    Args:
        tensor: what was given.
        name: how the caller names it, with the function ("ViTVQModel.encode: image").
        pattern: axis names separated by blanks; a number stands for itself.
        **sizes: known sizes of some axes.

    Returns:
        Size of each named axis.

    Raises:
        ValueError: if the number of axes or a known size differs. Skipped under torch.compile.
    """
    import torch

    axes = pattern.split()
    found = dict(zip(axes, tensor.shape, strict=False))
    if torch.compiler.is_compiling():
        return found
    wrong = len(axes) != tensor.ndim
    seen: dict[str, int] = {}
    for axis, size in zip(axes, tensor.shape, strict=False):
        expected = int(axis) if axis.isdigit() else sizes.get(axis, seen.get(axis, size))
        wrong = wrong or size != expected
        seen[axis] = size
    if wrong:
        known = "".join(f", {axis}={size}" for axis, size in sizes.items() if axis in axes)
        raise ValueError(f"{name} must be [{', '.join(axes)}]{known}, got {list(tensor.shape)}.")
    return found
