"""Shapes made from pictures against the true ones.

    python eval/generated_shapes.py --data data/lowpoly/test.parquet --count 24 --sheet sheet.png --train data/lowpoly/train.parquet \
        --ways genkit/shape-lowpoly genkit/shape-lowpoly-turbo:num_inference_steps=5

A way is a model, and behind a colon arguments of its call. The prompt is one turntable view of a mesh that the data also hold. Volume and
surface IoU, Chamfer distance and F-score as in eval/shapes.py. "renders": Frechet distance between four views each of the made and of the
true meshes, drawn in grey, on EfficientNet-Lite0's features; to be compared within one table only. The lookup gives the training shape
whose same view has the nearest features. Intervals are 95 %, bootstrap over shapes. `--sheet` shows prompts above true shapes above what
each way made.
"""

import argparse
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from _mesh_tables import cell, named_options, sheet
from PIL import Image
from torch import Tensor

from genkit import GenPipeline
from genkit.data.rendering import turntable
from genkit.data.shape_samples import meshes_of
from genkit.data.surfaces import normalised
from genkit.data.views import ViewDataset
from genkit.eval.assets import statistics_of
from genkit.eval.features import FeatureNetwork
from genkit.eval.frechet import GaussianStatistics, frechet_distance
from genkit.eval.solids import METRICS, Solid
from genkit.tokenizers.volume_decoders import NoSurfaceError

SIZE = 64  # pixels of prompts
RENDERS, RENDER_SIZE, GREY = 4, 64, 160
NEAREST = "nearest training shape"


class Judge:
    """Features of pictures and of renders."""

    def __init__(self) -> None:
        self.network = FeatureNetwork("efficientnet-lite0", size=SIZE)

    def pictures(self, pictures: list[Image.Image]) -> Tensor:
        """Return features [n, d] of pictures of one size."""
        stack = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)
        return cast(Tensor, self.network.features(stack.float() / 127.5 - 1))

    def renders(self, meshes: list[Any]) -> GaussianStatistics:
        """Return the statistics of the features of meshes drawn in grey."""
        grey = [turntable(mesh, RENDERS, RENDER_SIZE, np.full((len(mesh.faces), 3), GREY, np.uint8)) for mesh in meshes]
        return statistics_of(torch.cat([self.pictures(pictures) for pictures in grey]), f"efficientnet-lite0 at {SIZE} px")


class Lookup:
    """The training shape whose view is nearest to a picture.

    Args:
        path: training parquet.
        view: which view is compared.
        judge: gives the features.
    """

    def __init__(self, path: str, view: int, judge: Judge) -> None:
        self.items, self.judge, views = meshes_of(path), judge, ViewDataset(path, SIZE)
        self.features = torch.cat([judge.pictures([views.picture(number, view)]) for number in range(len(self.items))])

    def __call__(self, picture: Image.Image) -> Any:
        """Return the mesh."""
        best = int(torch.cdist(self.judge.pictures([picture]), self.features).argmin())
        return normalised(self.items[best][1]())[0]


def main() -> None:
    """Parse the command line, make the shapes, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", required=True, help="model or model:argument=value,...")
    parser.add_argument("--data", required=True, help="parquet file with views and meshes")
    parser.add_argument("--train", help="parquet file of the training shapes, for the lookup")
    parser.add_argument("--view", type=int, default=2, help="turntable view that is the prompt (default: %(default)s)")
    parser.add_argument("--resolution", type=int, default=128, help="cells of the grid a side (default: %(default)s)")
    parser.add_argument("--count", type=int, default=10_000, help="shapes, evenly spread over the data (default: all)")
    parser.add_argument("--points", type=int, default=4000, help="on each surface, and queries of each kind (default: %(default)s)")
    parser.add_argument("--sheet", type=Path, help="picture of the first 24 shapes")
    args = parser.parse_args()
    judge, items, views = Judge(), meshes_of(args.data), ViewDataset(args.data, SIZE)
    numbers = np.unique(np.linspace(0, len(items) - 1, min(args.count, len(items))).round().astype(int)).tolist()
    prompts = [views.picture(number, args.view) for number in numbers]
    truths = [normalised(items[number][1]())[0] for number in numbers]
    solids = [Solid.of(mesh, args.points, number) for mesh, number in zip(truths, numbers, strict=True)]
    makers: dict[str, Any] = {}
    for text in args.ways:
        name, options = named_options("--ways", text)
        pipe: Any = GenPipeline.from_pretrained(name)
        pipe.set_progress_bar_config(disable=True)
        makers[text] = lambda picture, number, pipe=pipe, options=options: pipe(
            picture, generator=[number], octree_resolution=args.resolution, **options
        ).meshes[0]
    if args.train:
        lookup = Lookup(args.train, args.view, judge)
        makers[NEAREST] = lambda picture, number: lookup(picture)
    true_renders = judge.renders(truths)
    print(f"{len(numbers)} shapes of {args.data}, view {args.view}, resolution {args.resolution}; {torch.get_num_threads()} threads\n")
    print("| way | volume IoU | surface IoU | Chamfer | F-score | renders | without surface | s |\n" + "|---" * 8 + "|")
    made: dict[str, list[Any]] = {}
    for label, make in makers.items():
        rows: list[dict[str, float]] = []
        clocks, made[label] = [], []
        for number, picture, solid in zip(numbers, prompts, solids, strict=True):
            began = time.perf_counter()
            try:
                mesh = make(picture, number)
            except NoSurfaceError:
                made[label].append(None)
                rows.append({name: 0.0 for name in METRICS if not name.startswith("chamfer")})
                continue
            clocks.append(time.perf_counter() - began)
            made[label].append(mesh)
            rows.append(solid.compare((solid.of_open if label == NEAREST else solid.of_closed)(mesh, number + 1)))
        found = [mesh for mesh in made[label] if mesh is not None]
        cells = [cell([row[name] for row in rows if name in row], 3) for name in METRICS]
        distance = frechet_distance(true_renders, judge.renders(found))
        print(f"| {label} |", " | ".join(cells), f"| {distance:.0f} | {len(rows) - len(found)} | {np.median(clocks):.2f} |", flush=True)
    if args.sheet:
        sheet(args.sheet, [truths[:24], *(meshes[:24] for meshes in made.values())], pictures=prompts[:24])
        print(f"\n{args.sheet}: prompts, true shapes, {', '.join(made)}")


if __name__ == "__main__":
    main()
