"""Token caches: the codes of a whole data set on disk, two bytes each (four where a codebook has more than 65,536), memory-mapped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from genkit.data.files import atomic_write

FORMAT = 1
MOST_CODES = 1 << 31


@dataclass(frozen=True)
class TokenMeta:
    """What a cache was made from; two caches are interchangeable if and only if these agree.

    Attributes:
        rows: number of pictures (or other samples).
        grid: shape of one sample's codes, for example (16, 16).
        codebook_size: codes are in 0..codebook_size - 1; at most 2**31.
        data_hash, tokenizer_hash: change when the data or the tokenizer's weights change.
    """

    rows: int
    grid: tuple[int, ...]
    codebook_size: int
    data_hash: str
    tokenizer_hash: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", tuple(int(n) for n in self.grid))
        if not 1 <= self.codebook_size <= MOST_CODES:
            raise ValueError(f"TokenCache: codebook_size must be in 1..{MOST_CODES}, got {self.codebook_size}.")
        if self.rows < 1 or not self.grid or min(self.grid) < 1:
            raise ValueError(f"TokenCache: rows and grid sides must be at least 1, got rows={self.rows}, grid={self.grid}.")

    @property
    def num_tokens(self) -> int:
        """Codes per row."""
        return int(np.prod(self.grid))

    @property
    def code_type(self) -> np.dtype[Any]:
        """Type of the numbers on disk: uint16 or uint32, little endian."""
        return np.dtype("<u2" if self.codebook_size <= 1 << 16 else "<u4")

    @property
    def row_bytes(self) -> int:
        """Bytes of a row on disk."""
        return self.num_tokens * self.code_type.itemsize

    def differences(self, other: TokenMeta) -> list[str]:
        """Return the fields in which two caches differ, as text."""
        mine, theirs = asdict(self), asdict(other)
        return [f"{key} is {theirs[key]}, expected {mine[key]}" for key in mine if mine[key] != theirs[key]]


def _read_meta(path: Path) -> tuple[TokenMeta, int]:
    """Return the meta data and the number of finished rows."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise ValueError("it has another format version")
        done = int(content.pop("done"))
        return TokenMeta(**content), done
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} does not describe a token cache of this version ({error}); remove {path.parent} to build it again."
        ) from error


class TokenCache(Dataset[dict[str, Tensor]]):
    """A finished cache: item i is `{"indices": int64 [n], "index": int64 []}`.

    Args:
        path: folder with `tokens.bin` ([rows, n], see `TokenMeta.code_type`) and `meta.json`.
        expected: what the cache must have been made from; not checked if None.

    Raises:
        FileNotFoundError: if there is no cache.
        ValueError: if it is unfinished, truncated, or made from something else; names every difference.
    """

    def __init__(self, path: str | Path, expected: TokenMeta | None = None) -> None:
        self.path = Path(path)
        if not (self.path / "meta.json").is_file():
            raise FileNotFoundError(f"{self.path} holds no token cache (meta.json is missing); write one with TokenWriter.")
        self.meta, done = _read_meta(self.path / "meta.json")
        _refuse_mismatch(self.path, self.meta, expected)
        if done != self.meta.rows:
            raise ValueError(f"{self.path} is unfinished: {done} of {self.meta.rows} rows; run the writer again, it goes on from there.")
        size = self.meta.rows * self.meta.row_bytes
        found = (self.path / "tokens.bin").stat().st_size if (self.path / "tokens.bin").is_file() else 0
        if found != size:
            raise ValueError(f"{self.path / 'tokens.bin'} must have {size} bytes, got {found}; remove {self.path} to build it again.")
        self._codes: np.memmap[Any, np.dtype[Any]] | None = None

    @property
    def codes(self) -> np.memmap[Any, np.dtype[Any]]:
        """All codes, memory-mapped, read-only, [rows, n]."""
        if self._codes is None:
            shape = (self.meta.rows, self.meta.num_tokens)
            self._codes = np.memmap(self.path / "tokens.bin", dtype=self.meta.code_type, mode="r", shape=shape)
        return self._codes

    def __len__(self) -> int:
        return self.meta.rows

    def indices(self, rows: int | slice | list[int] | Tensor) -> Tensor:
        """Return the codes of rows, int64 [n] or [rows, n]."""
        chosen = rows.cpu().numpy() if isinstance(rows, Tensor) else rows
        return torch.from_numpy(np.asarray(self.codes[chosen]).astype(np.int64))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} is outside 0..{len(self) - 1}.")
        return {"indices": self.indices(index), "index": torch.tensor(index)}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_codes": None}  # a worker process maps the file again


def _refuse_mismatch(path: Path, found: TokenMeta, expected: TokenMeta | None) -> None:
    differences = expected.differences(found) if expected is not None else []
    if differences:
        raise ValueError(f"{path} holds tokens of something else: {'; '.join(differences)}. Remove it or give another folder.")


class TokenWriter:
    """Write a cache so that a crash at any moment leaves either a readable cache or one that the next writer finishes.

    Codes are appended and synced to disk before `meta.json` counts them; what lies beyond the counted rows is cut off on resuming.

    Args:
        path: folder of the cache; created if needed. An unfinished cache of the same meta data is continued at `writer.done`.
        meta: what the codes come from.

    Raises:
        ValueError: if the folder holds a cache of something else.
    """

    def __init__(self, path: str | Path, meta: TokenMeta) -> None:
        self.path, self.meta, self.done = Path(path), meta, 0
        self.path.mkdir(parents=True, exist_ok=True)
        if (self.path / "meta.json").is_file():
            found, self.done = _read_meta(self.path / "meta.json")
            _refuse_mismatch(self.path, found, meta)
        data = self.path / "tokens.bin"
        data.touch()
        row_bytes = meta.row_bytes
        self.done = min(self.done, data.stat().st_size // row_bytes)
        self._file = data.open("r+b")
        self._file.truncate(self.done * row_bytes)
        self._file.seek(0, os.SEEK_END)
        self._count()

    def _count(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        with atomic_write(self.path / "meta.json") as file:
            file.write(json.dumps({"format": FORMAT, "done": self.done, **asdict(self.meta)}, indent=2).encode())

    def append(self, indices: Tensor) -> None:
        """Write the codes of the next rows.

        Args:
            indices: [b, n] or [b, *grid], integers in 0..codebook_size - 1.

        Raises:
            ValueError: if the shape or a code does not fit, or there are more rows than announced.
        """
        rows = indices.detach().reshape(len(indices), -1).cpu()
        if rows.shape[1] != self.meta.num_tokens or indices.is_floating_point():
            raise ValueError(
                f"TokenWriter.append: expected integers [b, {self.meta.num_tokens}] or [b, *{self.meta.grid}], "
                f"got {indices.dtype} {list(indices.shape)}."
            )
        if self.done + len(rows) > self.meta.rows:
            raise ValueError(f"TokenWriter.append: {self.done} + {len(rows)} rows exceed the announced {self.meta.rows}.")
        if len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= self.meta.codebook_size):
            span = f"{int(rows.min())}..{int(rows.max())}"
            raise ValueError(f"TokenWriter.append: codes must be in 0..{self.meta.codebook_size - 1}, got {span}.")
        self._file.write(rows.numpy().astype(self.meta.code_type).tobytes())
        self.done += len(rows)
        self._count()

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()


def build_cache(path: str | Path, meta: TokenMeta, encode: Callable[[range], Tensor], batch_size: int = 128) -> TokenCache:
    """Return the cache at `path`, writing what is missing.

    Args:
        path: folder of the cache.
        meta: what the codes come from.
        encode: returns the codes [b, n] of a range of rows.
        batch_size: rows per call of `encode`.
    """
    with TokenWriter(path, meta) as writer:
        for batch in _batches(writer.done, meta.rows, batch_size):
            writer.append(encode(batch))
    return TokenCache(path, meta)


def _batches(start: int, stop: int, size: int) -> Iterable[range]:
    return (range(first, min(first + size, stop)) for first in range(start, stop, size))
