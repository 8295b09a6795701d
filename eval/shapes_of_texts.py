"""A picture to look at: texts, what a picture model draws of them, and the shapes that are made of these pictures and of the texts alone.

    python eval/shapes_of_texts.py --ways genkit/shape-lowpoly --sheet sheet.png

A way is a model, and behind a colon arguments of its call, as in eval/generated_shapes.py. Rows: the pictures; then for each way the shapes
of the pictures, and, where the model reads text, those of the texts.
"""

import argparse
from pathlib import Path
from typing import Any

from _mesh_tables import named_options, sheet

from genkit import GenPipeline
from genkit.tokenizers.volume_decoders import NoSurfaceError

THINGS = "treasure chest, wooden table, barrel, tree, chair, red car, house, cactus, pumpkin, stone wall, fridge, crate"
TEXTS = tuple(f"a {thing}" for thing in THINGS.split(", "))


def main() -> None:
    """Parse the command line, draw, make the shapes, write the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", required=True, help="model or model:argument=value,...")
    parser.add_argument("--picture-model", default="genkit/enat-lowpoly", help="text to picture (default: %(default)s)")
    parser.add_argument("--texts", nargs="+", default=TEXTS, help="what to draw")
    parser.add_argument("--resolution", type=int, default=96, help="cells of the grid a side (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=3, help="of every picture and shape (default: %(default)s)")
    parser.add_argument("--sheet", type=Path, required=True, help="picture to write")
    args = parser.parse_args()
    artist: Any = GenPipeline.from_pretrained(args.picture_model)
    artist.set_progress_bar_config(disable=True)
    pictures = [artist(text, generator=[args.seed]).images[0] for text in args.texts]
    rows, labels = [], ["pictures"]
    for way in args.ways:
        name, options = named_options("--ways", way)
        pipe: Any = GenPipeline.from_pretrained(name)
        pipe.set_progress_bar_config(disable=True)

        def make(prompt: Any, pipe: Any = pipe, options: dict[str, Any] = options) -> Any:
            try:
                return pipe(prompt, generator=[args.seed], octree_resolution=args.resolution, **options).meshes[0]
            except NoSurfaceError:
                return None

        for label, prompts in (("pictures", pictures), *([("texts", args.texts)] if pipe.is_text_model else [])):
            rows.append([make(prompt) for prompt in prompts])
            labels.append(f"{way} of {label}")
    sheet(args.sheet, rows, pictures=pictures)
    print(f"{args.sheet}: {', '.join(labels)}; of {', '.join(args.texts)}")


if __name__ == "__main__":
    main()
