"""Compute the training samples of meshes: `python tokenizers/prepare_shapes.py data/lowpoly/train.parquet shapes/train --processes 2`.

Interrupted, it goes on where it was. The report in the folder names every mesh that cannot be used, and why.
"""

import argparse
import dataclasses

from genkit.data.mesh_fields import FieldCounts
from genkit.data.shape_samples import prepare

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("meshes", help="folder of mesh files, parquet file with vertices and faces, or hub id")
    parser.add_argument("out", help="folder of the samples")
    parser.add_argument("--split", default="train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    for item in dataclasses.fields(FieldCounts):
        parser.add_argument(f"--{item.name}", type=int, default=item.default, help=f"points: {item.name} (default: %(default)s)")
    args = parser.parse_args()
    counts = FieldCounts(**{item.name: getattr(args, item.name) for item in dataclasses.fields(FieldCounts)})
    found = prepare(args.meshes, args.out, counts, split=args.split, seed=args.seed, processes=args.processes)
    print(f"{len(found.names)} shapes in {args.out}, {found.computed} of them computed now; {len(found.refused)} refused")
    for name, reason in found.refused.items():
        print(f"  {name}: {reason}")
