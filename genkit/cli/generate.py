"""`genkit generate`: prompts to pictures, as one grid and on request one file each."""

from __future__ import annotations

import argparse
import inspect
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genkit.cli._models import check_model
from genkit.cli._output import add_json, positive, print_json
from genkit.cli._sampling import add_sampling, check_out_folder, choose_seeds, load_pipeline, sampling_options

if TYPE_CHECKING:
    from PIL.Image import Image

    from genkit.pipelines.base import GenPipeline

HELP = "generate pictures from prompts"

DEFAULT_MODEL = "genkit/enat-lowpoly"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("prompt", nargs="+", help="what to show: a text, or a class name or id where the model knows classes; quote it")
    add("--model", default=DEFAULT_MODEL, help="packaged name, folder, official file or hub id, see `genkit list` (default: %(default)s)")
    add("--num-images", type=positive, default=4, metavar="N", help="pictures per prompt (default: %(default)s)")
    add("--out", type=Path, metavar="FILE", help="grid to write, a .png; replaced if there (default: the prompt's words, next free name)")
    add("--each", action="store_true", help="also write every picture alone, beside the grid, as generated")
    add("--size", type=positive, metavar="PIXELS", help="width of a picture in the grid, resized without smoothing (default: as generated)")
    add("--image", type=Path, metavar="FILE", help="picture to repaint, with --mask")
    add("--mask", type=Path, metavar="FILE", help="black and white picture: white is painted anew, black is kept")
    add("--lora", type=Path, metavar="FOLDER", help="low-rank change of the model, from a training with task_config.lora")
    add("--lora-scale", type=float, default=1.0, metavar="S", help="how much of it (default: %(default)s)")
    add("--int8", choices=("weights", "dynamic"), help="8-bit integers in the network's linear maps; dynamic: inputs too (needs torchao)")
    add_sampling(parser, "picture")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Generate, write, and say where and how long it took."""
    check(args)
    began = time.perf_counter()
    pipe = load_pipeline(args)
    if args.lora is not None:
        pipe.load_lora(args.lora, args.lora_scale)
    if args.int8 is not None:
        pipe.to_int8(inputs=args.int8 == "dynamic")
    loaded = time.perf_counter()
    seeds = choose_seeds(args, len(args.prompt) * args.num_images)
    images = pipe(args.prompt, generator=seeds, **call_options(args, pipe)).images
    done = time.perf_counter()
    paths = write(args, images, seeds)
    report(args, paths, seeds, str(pipe.device), {"load": loaded - began, "generate": done - loaded})
    return 0


def check(args: argparse.Namespace) -> None:
    """Refuse what can be known to be wrong before anything large is imported.

    Raises:
        ValueError: empty prompt, half of a repaint request, a grid that is no PNG, or an unknown model.
        FileNotFoundError: a picture or an output folder that is not there.
    """
    if not all(prompt.strip() for prompt in args.prompt):
        raise ValueError("prompt is empty; say what to show, for example: genkit generate 'a treasure chest'.")
    if (args.image is None) != (args.mask is None):
        raise ValueError("--image and --mask belong together: the picture, and where to paint anew (white); give both.")
    for path in (args.image, args.mask):
        if path is not None and not path.is_file():
            raise FileNotFoundError(f"there is no picture at {str(path)!r}.")
    if args.out is not None:
        if args.out.suffix.lower() != ".png":
            raise ValueError(f"--out must end in .png, got {str(args.out)!r}.")
        check_out_folder(args.out)
    check_model(args.model)
    if args.lora is not None and not args.lora.is_dir():
        raise FileNotFoundError(f"--lora: there is no folder {str(args.lora)!r}.")


def call_options(args: argparse.Namespace, pipe: GenPipeline) -> dict[str, Any]:
    """Return the arguments of the pipeline's call; what was not given stays the model's.

    Raises:
        ValueError: if the model cannot repaint, or a picture cannot be read.
    """
    from PIL import Image, UnidentifiedImageError

    if "frames" in inspect.signature(pipe.__call__).parameters:
        raise ValueError(f"{args.model} makes clips, not pictures; use `genkit video --model {args.model}`.")
    if args.image is not None and "image" not in inspect.signature(pipe.__call__).parameters:
        raise ValueError(f"--image and --mask: {args.model} is a {type(pipe).__name__}, which cannot repaint; leave them out.")

    options: dict[str, Any] = {"num_images_per_prompt": args.num_images, **sampling_options(args)}
    for name, path in (("image", args.image), ("mask_image", args.mask)):
        if path is None:
            continue
        try:
            options[name] = Image.open(path).convert("RGB" if name == "image" else "L")
        except UnidentifiedImageError:
            raise ValueError(f"{str(path)!r} is not a picture that Pillow can read; convert it to PNG first.") from None
    return options


def write(args: argparse.Namespace, images: list[Image], seeds: list[int]) -> list[Path]:
    """Write the grid, one row per prompt (a single prompt fills a square), and the single pictures if asked.

    Returns:
        Path of the grid, then those of the single pictures.
    """
    from genkit.cli._pictures import file_name, free_path, grid, save_png

    path = args.out or free_path(Path(), file_name(args.prompt[0]))
    prompts = [prompt for prompt in args.prompt for _ in range(args.num_images)]
    columns = args.num_images if len(args.prompt) > 1 else math.ceil(math.sqrt(len(images)))
    notes = {"Software": "genkit", "model": args.model}
    sheet = grid(images, columns, args.size)
    save_png(sheet, path, notes | {"prompt": " | ".join(args.prompt), "seeds": f"{seeds[0]} to {seeds[-1]}"})
    paths = [path]
    if args.each:
        for index, (image, prompt, own) in enumerate(zip(images, prompts, seeds, strict=True), start=1):
            single = path.with_name(f"{path.stem}_{index:02d}.png")
            save_png(image, single, notes | {"prompt": prompt, "seed": str(own)})
            paths.append(single)
    return paths


def report(args: argparse.Namespace, paths: list[Path], seeds: list[int], device: str, seconds: dict[str, float]) -> None:
    """Say what was written, from which seeds, and how long it took."""
    if args.json:
        print_json(
            {
                "grid": str(paths[0]),
                "images": [str(path) for path in paths[1:]],
                "model": args.model,
                "prompts": args.prompt,
                "num_images": args.num_images,
                "seeds": seeds,
                "device": device,
                "seconds": {key: round(value, 3) for key, value in seconds.items()},
            }
        )
        return
    pictures = "1 picture, seed" if len(seeds) == 1 else f"{len(seeds)} pictures, seeds"
    each = f" and {len(paths) - 1} single files" if args.each else ""
    print(f"wrote {paths[0]}{each}: {pictures} {seeds[0]}" + (f" to {seeds[-1]}" if len(seeds) > 1 else ""))
    print(f"{seconds['generate']:.1f} s to generate, {seconds['load']:.1f} s to load {args.model} on {device}")
