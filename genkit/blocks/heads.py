"""Tokens to heads and back."""

from __future__ import annotations

from torch import Tensor


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Return [b, heads, n, hd] of [b, n, heads * hd]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """Return [b, n, heads * hd] of [b, heads, n, hd]."""
    return x.transpose(1, 2).flatten(2)


def head_count(name: str, own: int | None, default: int | None, dim: int) -> int:
    """Return the number of heads of a mixer.

    Args:
        name: of the mixer, for errors.
        own: its option.
        default: the model's.
        dim: d.

    Raises:
        ValueError: if neither gives a number, or it does not divide d.
    """
    chosen = default if own is None else own
    if chosen is None:
        raise ValueError(f"{name}: the number of heads is open; give heads in the stack string or to build().")
    if chosen < 1 or dim % chosen:
        raise ValueError(f"{name}: dim must be divisible by heads, got dim={dim}, heads={chosen}.")
    return chosen
