"""Explicit caches for decoding token by token: a mixer makes one, the caller keeps it and hands it back with each chunk.

Letters: b batch, n new tokens, hd head width.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys (already rotated) and values of the tokens seen so far, in buffers of a fixed length.

    Args:
        batch: b.
        heads: key/value heads.
        max_len: tokens the cache can hold.
        key_dim: width of a key head.
        value_dim: width of a value head.
        device: of the buffers.
        dtype: of the buffers; the keys and values must come in it.
    """

    def __init__(
        self, batch: int, heads: int, max_len: int, key_dim: int, value_dim: int, *, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        if max_len < 1:
            raise ValueError(f"KVCache: max_len must be at least 1, got {max_len}.")
        self.max_len = max_len
        self.length = 0
        self.k = torch.zeros(batch, heads, max_len, key_dim, device=device, dtype=dtype)
        self.v = torch.zeros(batch, heads, max_len, value_dim, device=device, dtype=dtype)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store n new tokens and return keys and values of all tokens so far, as views.

        Args:
            k: [b, heads, n, key_dim].
            v: [b, heads, n, value_dim].

        Returns:
            [b, heads, length, key_dim] and [b, heads, length, value_dim].

        Raises:
            RuntimeError: if the cache would overflow, or gradients are on (buffers written in place cannot carry them).
            ValueError: if batch, heads or widths differ. TypeError: if the dtype differs.
        """
        end = self.length + k.shape[2]
        if end > self.max_len:
            raise RuntimeError(
                f"KVCache is full: {self.length} of {self.max_len} tokens stored and {k.shape[2]} more given; "
                "make it with a larger max_len or call reset()."
            )
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise RuntimeError("KVCache holds no gradients: decode under torch.no_grad(), or train without a cache.")
        if k.dtype != self.k.dtype:
            raise TypeError(f"KVCache was made for {self.k.dtype}, got keys in {k.dtype}; make it with dtype={k.dtype}.")
        expected = (*self.k.shape[:2], k.shape[2], self.k.shape[3])
        if tuple(k.shape) != expected:
            raise ValueError(f"KVCache: keys must be {list(expected)} (b, heads, n, key_dim), got {list(k.shape)}.")
        self.k[:, :, self.length : end] = k
        self.v[:, :, self.length : end] = v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]

    def grow(self, max_len: int) -> None:
        """Make room for `max_len` tokens; those that are there stay. Doubling it each time costs one copy per token in all."""
        if max_len <= self.max_len:
            return
        for name in ("k", "v"):
            old: Tensor = getattr(self, name)
            new = old.new_zeros(*old.shape[:2], max_len, old.shape[3])
            new[:, :, : self.length] = old[:, :, : self.length]
            setattr(self, name, new)
        self.max_len = max_len

    def reset(self) -> None:
        """Forget all tokens."""
        self.length = 0

    def reorder(self, index: Tensor) -> None:
        """Keep the batch rows `index` [b2] int64, in that order (beam search, dropping finished samples)."""
        self.k = self.k.index_select(0, index)
        self.v = self.v.index_select(0, index)


class StateCache:
    """Named tensors with the batch axis first: the state of a recurrent mixer.

    Args:
        **tensors: initial values, each [b, ...]; reset() returns to zeros of the same shapes.

    Example:
        >>> cache = StateCache(state=torch.zeros(2, 4))
        >>> cache["state"] = torch.ones(2, 4)
        >>> cache.reorder(torch.tensor([1])); cache["state"].shape
        torch.Size([1, 4])
    """

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = dict(tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __setitem__(self, name: str, value: Tensor) -> None:
        old = self.tensors.get(name)
        if old is None or old.shape != value.shape:
            known = {key: list(tensor.shape) for key, tensor in self.tensors.items()}
            raise ValueError(f"StateCache holds {known}; cannot store {name!r} of shape {list(value.shape)}.")
        self.tensors[name] = value

    def reset(self) -> None:
        """Set every tensor to zero."""
        self.tensors = {name: torch.zeros_like(tensor) for name, tensor in self.tensors.items()}

    def reorder(self, index: Tensor) -> None:
        """Keep the batch rows `index` [b2] int64, in that order."""
        self.tensors = {name: tensor.index_select(0, index) for name, tensor in self.tensors.items()}


class ShiftCache:
    """The cache of a mixer behind a token shift, and the token before the next one.

    Args:
        inner: of the mixer.
        previous: [b, 1, d]; zeros at the start.
    """

    def __init__(self, inner: KVCache, previous: Tensor) -> None:
        self.inner, self.previous = inner, previous

    @property
    def length(self) -> int:
        """Tokens so far."""
        return self.inner.length

    def reset(self) -> None:
        """Forget all tokens."""
        self.inner.reset()
        self.previous = torch.zeros_like(self.previous)

    def reorder(self, index: Tensor) -> None:
        """Keep the batch rows `index` [b2] int64, in that order."""
        self.inner.reorder(index)
        self.previous = self.previous.index_select(0, index)
