"""`genkit shape`: a picture, several views or a text to a mesh, with a turntable of what was made."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from genkit.cli._meshes import check_files, write_preview
from genkit.cli._output import add_json, positive, print_json
from genkit.cli._sampling import add_sampling, choose_seeds, load_pipeline, sampling_options

HELP = "make a mesh from a picture, from views or from text"

DEFAULT_MODEL = "genkit/shape-lowpoly"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SIDES = ("front", "left", "back", "right")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add(
        "prompt",
        nargs="+",
        help="a picture file (object on a plain or transparent background), a text, or with --views one picture per side",
    )
    add("--model", default=DEFAULT_MODEL, help="packaged name, folder or official file, see `genkit list` (default: %(default)s)")
    add("--views", nargs="+", choices=SIDES, help="the sides that the pictures show, in their order; they are one object then")
    add("--num-shapes", type=positive, default=1, metavar="N", help="shapes per prompt (default: %(default)s)")
    add("--out", type=Path, default=Path("shape.glb"), metavar="FILE", help="mesh to write; several are numbered (default: %(default)s)")
    add("--resolution", type=positive, metavar="R", help="cells of the grid a side (default: the model's)")
    add("--decoder", choices=("dense", "hierarchical", "flash"), help="where the field is evaluated (default: the model's)")
    add("--head", choices=("base", "slim"), help="which head evaluates it (default: the model's)")
    add("--max-faces", type=positive, metavar="N", help="budget of each mesh (default: as many as come)")
    add("--preview", type=Path, metavar="FILE", help="turntable, a row each, a .png, or a turning .gif (default: beside the mesh)")
    add_sampling(parser, "shape")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Make the shapes, write them and their turntables, and say where and how long it took."""
    prompts = check(args)
    began = time.perf_counter()
    pipe: Any = load_pipeline(args)
    if not hasattr(pipe, "vae") or not hasattr(pipe.vae, "query") or not hasattr(pipe, "transformer"):
        raise ValueError(f"{args.model} is a {type(pipe).__name__}, which makes no shapes; `genkit list` says what each model makes.")
    loaded = time.perf_counter()
    count = (1 if args.views else len(prompts)) * args.num_shapes
    seeds = choose_seeds(args, count)
    options = {
        "octree_resolution": args.resolution,
        "decoder": args.decoder,
        "head": args.head,
        "max_faces": args.max_faces,
        "views": args.views,
    }
    output = pipe(prompts, num_images_per_prompt=args.num_shapes, generator=seeds, **options, **sampling_options(args))
    done = time.perf_counter()
    paths = [args.out if count == 1 else args.out.with_name(f"{args.out.stem}-{i + 1}{args.out.suffix}") for i in range(count)]
    preview = args.preview or args.out.with_name(f"{args.out.stem}-preview.png")
    write(paths, preview, output.meshes)
    seconds = {"load": round(loaded - began, 3), "generate": round(done - loaded, 3)}
    shapes = [
        {"mesh": str(path), "seed": seed, "vertices": len(mesh.vertices), "faces": len(mesh.faces), "watertight": bool(mesh.is_watertight)}
        for path, seed, mesh in zip(paths, seeds, output.meshes, strict=True)
    ]
    if args.json:
        print_json({"shapes": shapes, "preview": str(preview), "model": args.model, "seconds": seconds})
        return 0
    for shape in shapes:
        closed = "closed" if shape["watertight"] else "open"
        print(f"wrote {shape['mesh']}: {shape['vertices']:,} vertices, {shape['faces']:,} faces, {closed}, seed {shape['seed']}")
    each = f"{(done - loaded) / count:.1f} s per shape"
    print(f"turntable: {preview}; {each}, {loaded - began:.1f} s to load {args.model} on {pipe.device}")
    return 0


def check(args: argparse.Namespace) -> list[Any]:
    """Refuse what can be known to be wrong before anything large is imported; return texts and pictures.

    Raises:
        ValueError: for an empty prompt, formats that cannot be written, or views whose number is not that of the pictures.
        FileNotFoundError: for a picture or folder that is not there.
    """
    check_files(args.out, args.preview, [args.model])
    if args.views and len(args.views) != len(args.prompt):
        raise ValueError(
            f"--views names {len(args.views)} sides ({', '.join(args.views)}) for {len(args.prompt)} pictures; give one per picture."
        )
    return [read_prompt(text, args.views is not None) for text in args.prompt]


def read_prompt(text: str, is_view: bool) -> Any:
    """Return a text, or the picture that it names.

    Raises:
        FileNotFoundError: for a picture that is not there. ValueError: for nothing, or a file that is no picture.
    """
    path = Path(text)
    if not text.strip():
        raise ValueError("the prompt is empty; give a picture or say what to make, for example: genkit shape chest.png.")
    if not is_view and path.suffix.lower() not in PICTURES and not path.is_file():
        return text
    if not path.is_file():
        raise FileNotFoundError(f"there is no picture at {text!r}.")
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            image.load()
            return image.copy()
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{text} cannot be read as a picture ({error}).") from error


def write(paths: list[Path], preview: Path, meshes: list[Any]) -> None:
    """Write meshes and their turntables, a row each."""
    for path, mesh in zip(paths, meshes, strict=True):
        mesh.export(path)
    write_preview(preview, meshes)
