"""Token caches: round trip, resuming, refusing what does not fit."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import pytest
import torch

from genkit.data.tokens import TokenCache, TokenMeta, TokenWriter, build_cache

META = TokenMeta(rows=5, grid=(2, 3), codebook_size=65536, data_hash="d", tokenizer_hash="t")
CODES = torch.randint(0, 65536, (5, 6), generator=torch.Generator().manual_seed(0))
CODES[0, 0], CODES[4, 5] = 65535, 0


def write(path: Path, rows: int = 5) -> None:
    with TokenWriter(path, META) as writer:
        writer.append(CODES[writer.done : rows])


def test_codes_round_trip_as_int64(tmp_path: Path) -> None:
    write(tmp_path)
    cache = TokenCache(tmp_path, META)
    assert len(cache) == 5
    assert cache.indices(slice(None)).dtype == torch.int64
    assert torch.equal(cache.indices(slice(None)), CODES)
    assert torch.equal(cache.indices(torch.tensor([3, 1])), CODES[[3, 1]])
    assert torch.equal(cache[4]["indices"], CODES[4])
    assert torch.equal(pickle.loads(pickle.dumps(cache))[2]["indices"], CODES[2])
    assert (tmp_path / "tokens.bin").stat().st_size == 5 * 6 * 2
    with pytest.raises(IndexError, match="0..4"):
        cache[5]


def test_unfinished_cache_is_refused_and_continued(tmp_path: Path) -> None:
    write(tmp_path, rows=2)
    with pytest.raises(ValueError, match="2 of 5 rows"):
        TokenCache(tmp_path)
    with (tmp_path / "tokens.bin").open("ab") as file:
        file.write(b"torn write")
    asked: list[range] = []

    def encode(rows: range) -> torch.Tensor:
        asked.append(rows)
        return CODES[rows.start : rows.stop]

    cache = build_cache(tmp_path, META, encode, batch_size=2)
    assert asked == [range(2, 4), range(4, 5)]
    assert torch.equal(cache.indices(slice(None)), CODES)
    build_cache(tmp_path, META, encode)
    assert len(asked) == 2


def test_cache_of_something_else_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path)
    other = dataclasses.replace(META, tokenizer_hash="u", codebook_size=512)
    for use in (TokenCache, TokenWriter):
        with pytest.raises(ValueError, match=r"codebook_size is 65536, expected 512; tokenizer_hash is t, expected u"):
            use(tmp_path, other)


def test_truncated_and_corrupt_caches_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no token cache"):
        TokenCache(tmp_path)
    write(tmp_path)
    with (tmp_path / "tokens.bin").open("r+b") as file:
        file.truncate(40)
    with pytest.raises(ValueError, match="60 bytes, got 40"):
        TokenCache(tmp_path)
    (tmp_path / "meta.json").write_text("{}")
    with pytest.raises(ValueError, match="does not describe"):
        TokenCache(tmp_path)


@pytest.mark.parametrize(
    ("codes", "match"),
    [
        (torch.full((1, 6), 600), r"0\.\.511"),
        (torch.full((1, 6), -1), "-1"),
        (torch.zeros(1, 5, dtype=torch.int64), r"\[1, 5\]"),
        (torch.zeros(1, 6), "float32"),
        (torch.zeros(6, 6, dtype=torch.int64), "exceed the announced 5"),
    ],
)
def test_codes_that_do_not_fit_are_refused(tmp_path: Path, codes: torch.Tensor, match: str) -> None:
    with TokenWriter(tmp_path, dataclasses.replace(META, codebook_size=512)) as writer, pytest.raises(ValueError, match=match):
        writer.append(codes)


def test_large_codebooks_take_four_bytes_a_code(tmp_path: Path) -> None:
    large = dataclasses.replace(META, codebook_size=262_144)
    codes = CODES * 4 + 3
    with TokenWriter(tmp_path, large) as writer:
        writer.append(codes)
    assert (tmp_path / "tokens.bin").stat().st_size == 5 * 6 * 4
    assert torch.equal(TokenCache(tmp_path, large).indices(slice(None)), codes)


def test_codebook_must_fit_four_bytes() -> None:
    with pytest.raises(ValueError, match="2147483648, got 2147483649"):
        dataclasses.replace(META, codebook_size=2**31 + 1)
