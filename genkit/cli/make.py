"""`genkit make`: a prompt to an asset: picture, shape, low-poly mesh, turntable, and a record of how they were made."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from genkit.cli import generate, remesh, shape
from genkit.cli._models import check_model
from genkit.cli._output import add_json, positive, print_json
from genkit.cli._sampling import check_out_folder, seed

HELP = "make an asset from a prompt: picture, shape, low-poly mesh, turntable"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("prompt", help="what to make; quote it")
    add("--out", type=Path, required=True, metavar="FOLDER", help="folder of the files; what is done there already is not done again")
    add("--image-model", default=generate.DEFAULT_MODEL, help="text to picture (default: %(default)s)")
    add("--shape-model", default=shape.DEFAULT_MODEL, help="picture to shape (default: %(default)s)")
    add("--mesh-model", default=remesh.DEFAULT_MODEL, help="shape to low-poly mesh (default: %(default)s)")
    add("--max-faces", type=positive, metavar="N", help="of the low-poly mesh (default: the model's)")
    add(
        "--candidates",
        type=positive,
        metavar="N",
        help="low-poly meshes to draw and keep the nearest to the shape of; 1 takes the most probable tokens (default: the model's)",
    )
    add("--seed", type=seed, default=0, metavar="N", help="of every stage (default: %(default)s)")
    add("--device", help="cpu, cuda, cuda:1, mps (default: an accelerator if there is one)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Make what is not there yet, and say what was done and how long it took."""
    check(args)
    from genkit.cli._models import pick_device
    from genkit.pipelines.chain import NOTES, ChainConfig, StageNote, make_asset

    config = ChainConfig(
        args.prompt,
        args.image_model,
        args.shape_model,
        args.mesh_model,
        args.seed,
        args.max_faces,
        args.candidates,
        pick_device(args.device),
    )

    def tell(name: str, note: StageNote, is_old: bool) -> None:
        if not args.json:
            facts = ", ".join(f"{key} {value}" for key, value in note.facts.items())
            print(f"{args.out / note.file}: {facts}; {'there already' if is_old else f'{note.seconds:.1f} s'}", flush=True)

    notes = make_asset(config, args.out, tell)
    total = sum(note.seconds for note in notes.values())
    if args.json:
        stages: dict[str, Any] = {
            name: {"file": str(args.out / note.file), "seconds": note.seconds, **note.facts} for name, note in notes.items()
        }
        print_json({"prompt": args.prompt, "seed": args.seed, "stages": stages, "seconds": round(total, 3), "notes": str(args.out / NOTES)})
        return 0
    print(f"{total:.1f} s in all; {args.out / NOTES} says what everything was made with")
    return 0


def check(args: argparse.Namespace) -> None:
    """Refuse what can be known to be wrong before anything large is imported.

    Raises:
        ValueError: for an empty prompt, or an unknown model.
        FileNotFoundError: for a folder whose parent is not there.
    """
    if not args.prompt.strip():
        raise ValueError("the prompt is empty; say what to make, for example: genkit make 'a wooden table' --out table.")
    check_out_folder(args.out)
    for model in (args.image_model, args.shape_model, args.mesh_model):
        check_model(model)
