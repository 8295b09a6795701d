"""What `genkit generate` and `genkit video` share: options of sampling, loading, folders to write to."""

from __future__ import annotations

import argparse
import math
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genkit.cli._output import positive

if TYPE_CHECKING:
    from genkit.pipelines.base import GenPipeline


def seed(text: str) -> int:
    """Parse a seed (an argparse type)."""
    if not text.isdigit() or int(text) >= 2**62:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2**62 - 1, got {text!r}")
    return int(text)


def guidance(text: str) -> float:
    """Parse a guidance scale (an argparse type)."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 1):
        raise argparse.ArgumentTypeError(f"must be a number of at least 1 (1 is off), got {text!r}")
    return value


def add_sampling(parser: argparse.ArgumentParser, thing: str) -> None:
    """Add the options of sampling to a command that makes things."""
    add = parser.add_argument
    add("--seed", type=seed, metavar="N", help=f"seed of the first {thing}; the next take N+1, N+2, ... (default: random, and printed)")
    add("--steps", type=positive, metavar="N", help="sampling steps (default: the model's)")
    add("--guidance-scale", type=guidance, metavar="G", help="how closely to follow the prompt, 1 is off (default: the model's)")
    add("--device", help="cpu, cuda, cuda:1, mps (default: an accelerator if there is one)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="precision (default: %(default)s)")


def check_out_folder(path: Path) -> None:
    """Refuse an output whose folder is not there.

    Raises:
        FileNotFoundError: naming the folder.
    """
    folder = path.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"--out: there is no folder {str(folder)!r}; make it first.")


def load_pipeline(args: argparse.Namespace) -> GenPipeline:
    """Load the pipeline and put it on the device."""
    import torch

    from genkit.cli._models import pick_device
    from genkit.pipelines.base import GenPipeline

    device = pick_device(args.device)
    pipe = GenPipeline.from_pretrained(args.model, torch_dtype=getattr(torch, args.dtype))
    pipe.set_progress_bar_config(desc="generating", leave=False, disable=args.json)
    return pipe.to(device)


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of a pipeline's call; what was not given stays the model's."""
    named = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale}
    return {name: value for name, value in named.items() if value is not None}


def choose_seeds(args: argparse.Namespace, count: int) -> list[int]:
    """Return the seeds of `count` samples."""
    first = secrets.randbelow(2**31) if args.seed is None else args.seed
    return list(range(first, first + count))
