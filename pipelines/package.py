r"""Put a trained pipeline into the package: half precision, components that others have too shared, sidecar and certificate.

    python pipelines/package.py runs/enat_lowpoly/export enat-lowpoly --text text-lowpoly \
        --summary "text to 64x64 pictures of low-poly game assets" --licence Apache-2.0 --prompt "a wooden table" --prompt "a tree"
    python pipelines/package.py runs/vdt-lowpoly/export vdt-lowpoly --text text-lowpoly --share vae=enat-lowpoly/vqvae \
        --summary "turntables of game assets from text, pictures or clips" --prompt "a treasure chest" --per-prompt 1
    python pipelines/package.py runs/shape-vae-lowpoly-slim/export shape-vae-lowpoly --summary "meshes to latents and back" --mesh chair.obj

Writes `genkit/pretrained/<name>`. Components of --share, and with --text the text encoder and tokenizer, lie in folders below
`genkit/pretrained` that several models name: they are written if they are not there, else they have to be the same.
Existing weights are replaced; a README.md (the model card) in the folder is kept.
"""

import argparse
import inspect
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml

from genkit import GenPipeline
from genkit.catalogue import write_sidecar
from genkit.eval.meshes import load_mesh
from genkit.parity import certificate
from genkit.paths import pretrained_dir
from genkit.weights import read_safetensors

TEXT = ("text_encoder", "tokenizer")


def share(part: Path, place: Path) -> None:
    """Put a component where models share it; one that is there already has to be the same.

    Raises:
        SystemExit: if other models use another one.
    """
    if not place.is_dir():
        shutil.copytree(part, place)
        return
    for file in part.glob("*.safetensors"):
        mine, theirs = (read_safetensors(folder / file.name) for folder in (part, place))
        if mine.keys() != theirs.keys() or any(not torch.equal(mine[key], theirs[key]) for key in mine):
            raise SystemExit(f"{place} holds other weights than {part.name} of this pipeline, and other models use them; choose another.")


def settings(option: str, texts: list[str], known: Iterable[str]) -> dict[str, Any]:
    """Return NAME=VALUE texts as a dictionary.

    Args:
        option: that they were given to.
        texts: as typed.
        known: names that exist.

    Raises:
        SystemExit: if a text has no "=", or names a setting that does not exist.
    """
    found, names = {}, [name for name in known if not name.startswith("_")]
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name not in names:
            raise SystemExit(f"{option} {text}: write NAME=VALUE with one of {', '.join(names)}.")
        found[name] = yaml.safe_load(value)
    return found


def main() -> None:
    """Parse the command line and write the folders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", help="folder of a trained pipeline")
    parser.add_argument("name", help="name below genkit/pretrained")
    parser.add_argument("--text", help="folder below genkit/pretrained for the shared text encoder and tokenizer")
    parser.add_argument("--share", action="append", default=[], metavar="COMPONENT=FOLDER", help="shared component; may be repeated")
    parser.add_argument("--summary", required=True, help="what `genkit list` says")
    parser.add_argument("--licence", default="Apache-2.0", help="of the weights, an SPDX identifier")
    parser.add_argument("--prompt", action="append", default=[], help="prompt of the certificate; may be repeated")
    parser.add_argument("--mesh", action="append", default=[], help="mesh file that is a prompt of the certificate; may be repeated")
    parser.add_argument("--per-prompt", type=int, default=2, help="pictures or clips of each such prompt (default: %(default)s)")
    parser.add_argument("--scheduler", action="append", default=[], metavar="NAME=VALUE", help="setting of the scheduler; may be repeated")
    parser.add_argument("--config", action="append", default=[], metavar="NAME=VALUE", help="setting of the pipeline; may be repeated")
    args = parser.parse_args()
    pipe = GenPipeline.from_pretrained(args.export)
    if args.scheduler:
        changed = settings("--scheduler", args.scheduler, pipe.scheduler.config)
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **changed)
    pipe.register_to_config(**settings("--config", args.config, pipe.config))
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    parameters = sum(p.numel() for module in modules for p in module.parameters())
    first = next(iter(inspect.signature(pipe.estimate_memory).parameters))
    memory = (pipe.estimate_memory(4) if first.startswith("num_") else pipe.estimate_memory()).peak / 1e6
    pipe.to(torch.float16)
    shared = {part: f"{args.text}/{part}" for part in TEXT} if args.text else {}
    shared |= settings("--share", args.share, pipe.components)
    folder = pretrained_dir() / args.name
    with tempfile.TemporaryDirectory() as whole:
        pipe.save_pretrained(whole)
        for part, place in shared.items():
            share(Path(whole) / part, pretrained_dir() / place)
    with tempfile.TemporaryDirectory() as kept:
        card = folder / "README.md"
        if card.is_file():
            shutil.copy(card, kept)
        if folder.is_dir():
            shutil.rmtree(folder)
        pipe.save_pretrained(folder, shared=shared)
        if (Path(kept) / "README.md").is_file():
            shutil.copy(Path(kept) / "README.md", card)
    write_sidecar(folder, summary=args.summary, licence=args.licence, parameters=parameters, memory_mb=round(memory))
    seeds = list(range(1, args.per_prompt + 1))
    calls = [{"prompt": prompt, "num_images_per_prompt": len(seeds), "generator": seeds} for prompt in args.prompt]
    known = inspect.signature(pipe.__call__).parameters
    argument = next(iter(known))
    draws = {"do_sample": False} if "do_sample" in known else {}  # the most probable tokens: those of any machine
    calls += [{argument: load_mesh(Path(path)), "generator": [1], **draws} for path in args.mesh]
    if calls:
        certificate.write(folder, calls)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {parameters / 1e6:.2f} M parameters, {size / 1e6:.2f} MB without what it shares")


if __name__ == "__main__":
    main()
