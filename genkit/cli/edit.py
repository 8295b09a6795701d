"""`genkit edit`: paint a part of a picture anew by a prompt; all else stays as it is, pixel for pixel."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genkit.cli import generate
from genkit.cli._models import check_model
from genkit.cli._output import add_json, positive, print_json
from genkit.cli._sampling import add_sampling, check_out_folder, choose_seeds, load_pipeline

if TYPE_CHECKING:
    from PIL.Image import Image

HELP = "paint a part of a picture anew by a prompt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("image", type=Path, help="picture to change")
    add("prompt", help="what the whole picture is to show: a text, or a class name or id where the model knows classes; quote it")
    add("--mask", type=Path, required=True, metavar="FILE", help="black and white picture of the same size: white is painted anew")
    add("--model", default=generate.DEFAULT_MODEL, help="packaged name, folder or official file, see `genkit list` (default: %(default)s)")
    add("--num-images", type=positive, default=1, metavar="N", help="pictures to make (default: %(default)s)")
    add("--resize", action="store_true", help="bring picture and mask to the model's size first")
    add("--out", type=Path, default=Path("edited.png"), metavar="FILE", help="a .png; numbered if several (default: %(default)s)")
    add("--sheet", type=Path, metavar="FILE", help="contact sheet of before, mask and after, a .png (default: beside the picture)")
    add_sampling(parser, "picture")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Paint, write, and say where and how long it took."""
    check(args)
    began = time.perf_counter()
    pipe = load_pipeline(args)
    loaded = time.perf_counter()
    options = generate.call_options(args, pipe)
    before, mask = fitted(args, pipe, options["image"], options["mask_image"])
    seeds = choose_seeds(args, args.num_images)
    made = pipe(args.prompt, generator=seeds, **{**options, "image": before, "mask_image": mask}).images
    done = time.perf_counter()
    write(args, before, mask, [composed(image, before, mask) for image in made], seeds, {"load": loaded - began, "generate": done - loaded})
    return 0


def check(args: argparse.Namespace) -> None:
    """Refuse what can be known to be wrong before anything large is imported.

    Raises:
        ValueError: empty prompt, outputs that are no PNG, or an unknown model.
        FileNotFoundError: a picture or an output folder that is not there.
    """
    if not args.prompt.strip():
        raise ValueError("prompt is empty; say what the picture is to show.")
    for path in (args.image, args.mask):
        if not path.is_file():
            raise FileNotFoundError(f"there is no picture at {str(path)!r}.")
    for name, path in (("--out", args.out), ("--sheet", args.sheet)):
        if path is not None and path.suffix.lower() != ".png":
            raise ValueError(f"{name} must end in .png, got {str(path)!r}.")
    check_out_folder(args.out)
    check_model(args.model)


def fitted(args: argparse.Namespace, pipe: Any, image: Image, mask: Image) -> tuple[Image, Image]:
    """Return picture and mask at the model's size, the mask in black and white.

    Raises:
        ValueError: if they differ in size, or need --resize.
    """
    from PIL.Image import Resampling

    if mask.size != image.size:
        raise ValueError(f"--mask must be as large as the picture, {image.size[0]}x{image.size[1]}, got {mask.size[0]}x{mask.size[1]}.")
    height, width = pipe.image_size
    if image.size != (width, height):
        if not args.resize:
            got = f"{image.size[0]}x{image.size[1]}"
            raise ValueError(f"the picture is {got} pixels, the model makes {width}x{height}; add --resize to bring it there.")
        image, mask = image.resize((width, height), Resampling.LANCZOS), mask.resize((width, height), Resampling.NEAREST)
    return image, mask.point([255 if value > 127 else 0 for value in range(256)])


def composed(made: Image, before: Image, mask: Image) -> Image:
    """Return what was made where the mask is white, and the picture as it was elsewhere."""
    result = before.copy()
    result.paste(made, mask=mask)
    return result


def write(args: argparse.Namespace, before: Image, mask: Image, after: list[Image], seeds: list[int], seconds: dict[str, float]) -> None:
    """Write the pictures and the sheet, and say so."""
    from genkit.cli._pictures import grid, save_png

    notes = {"Software": "genkit", "model": args.model, "prompt": args.prompt}
    paths = [args.out] if len(after) == 1 else [args.out.with_name(f"{args.out.stem}_{i + 1:02d}.png") for i in range(len(after))]
    for image, path, seed in zip(after, paths, seeds, strict=True):
        save_png(image, path, notes | {"seed": str(seed)})
    sheet = args.sheet or args.out.with_name(f"{args.out.stem}-sheet.png")
    save_png(grid([before, mask.convert("RGB"), *after], len(after) + 2), sheet, notes | {"seeds": f"{seeds[0]} to {seeds[-1]}"})
    if args.json:
        rounded = {key: round(value, 3) for key, value in seconds.items()}
        print_json({"images": [str(path) for path in paths], "sheet": str(sheet), "model": args.model, "seeds": seeds, "seconds": rounded})
        return
    print(f"wrote {', '.join(map(str, paths))}, seeds {seeds[0]} to {seeds[-1]}; {sheet}: before, mask, after")
    print(f"{seconds['generate']:.1f} s to generate, {seconds['load']:.1f} s to load {args.model}")
