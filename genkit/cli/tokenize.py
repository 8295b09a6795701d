"""`genkit tokenize`: the codes of all pictures of a data set, written once; stopped and started again it goes on."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from genkit.cli._models import check_model, pick_device
from genkit.cli._output import add_json, bytes_text, positive, print_json, progress_bar

DEFAULT_MODEL = "genkit/enat-lowpoly"
HELP = "write the codes of a whole data set"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("pictures", help="folder of pictures, parquet file of turntable views, or hub id")
    add_tokenizer(parser)
    add("--flip", action="store_true", help="also the mirrored pictures, behind the others")
    add("--out", type=Path, metavar="FOLDER", help="where to (default: where a training on these pictures looks for them)")
    add_json(parser)


def add_tokenizer(parser: argparse.ArgumentParser) -> None:
    """Add the options of a command that passes pictures through a tokenizer."""
    add = parser.add_argument
    add("--model", default=DEFAULT_MODEL, help="tokenizer: packaged name, folder or hub id, see `genkit list` (default: %(default)s)")
    add("--size", type=positive, metavar="PIXELS", help="side that pictures are cut and reduced to (default: the tokenizer's)")
    add("--tile", type=positive, metavar="PIXELS", help="pass larger pictures in overlapping tiles of this side (default: whole pictures)")
    add("--batch-size", type=positive, default=32, metavar="N", help="pictures at a time (default: %(default)s)")
    add("--device", help="cpu, cuda, cuda:1, mps (default: an accelerator if there is one)")


def open_both(args: argparse.Namespace):  # type: ignore[no-untyped-def]  # types that load torch
    """Return the tokenizer on its device and the pictures.

    Raises:
        ValueError: for a tokenizer that names no size, and pictures smaller than asked for.
        FileNotFoundError: if there are no pictures.
    """
    check_model(args.model)
    device = pick_device(args.device)
    from genkit.data.images import open_dataset
    from genkit.pipelines.tokenizers import load_tokenizer

    model = load_tokenizer(args.model)
    side = model.config["sample_size"]
    size = args.size or (side if isinstance(side, int) or side is None else min(side))
    if size is None:
        raise ValueError(f"{args.model} does not say for which size it was made; give --size.")
    return model.to(device), open_dataset(args.pictures, size)


def run(args: argparse.Namespace) -> int:
    """Write the codes and say where and how many."""
    model, data = open_both(args)
    from genkit.paths import cache_dir
    from genkit.pipelines.tokenizers import DataTokens

    tokens = DataTokens(model, data, args.flip, args.tile)
    folder = args.out or tokens.folder(cache_dir())
    began = time.perf_counter()
    done = 0

    def note(rows: int, total: int, seconds: float) -> None:
        nonlocal done
        done = rows
        if bar is not None:
            bar(rows, total, seconds)

    with progress_bar(not args.json, "codes") as bar:
        cache = tokens.write(folder, args.batch_size, note)
    seconds, meta = time.perf_counter() - began, cache.meta
    size = meta.rows * meta.row_bytes
    if args.json:
        print_json({"folder": str(folder), "rows": meta.rows, "grid": meta.grid, "codebook_size": meta.codebook_size, "bytes": size,
                    "seconds": round(seconds, 3)})  # fmt: skip
        return 0
    print(f"{folder}: {meta.rows:,} x {meta.grid[0]}x{meta.grid[1]} codes of {meta.codebook_size:,}, {bytes_text(size)}")
    print(f"{seconds:.1f} s" if done else "they were there already")
    return 0
