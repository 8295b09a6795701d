r"""Put a trained text-to-picture pipeline into the package: half precision, its text encoder shared, sidecar and certificate.

    python pipelines/package.py runs/enat_lowpoly/export enat-lowpoly --text text-lowpoly \
        --summary "text to 64x64 pictures of low-poly game assets" --licence Apache-2.0 --prompt "a wooden table" --prompt "a tree"

Writes `genkit/pretrained/<name>`. With --text, text encoder and tokenizer lie in `genkit/pretrained/<text>`, which other models share: they
are written if they are not there, else they have to be the same.
Existing weights are replaced; a README.md (the model card) in the folder is kept.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import torch
import yaml

from genkit import GenPipeline
from genkit.catalogue import write_sidecar
from genkit.parity import certificate
from genkit.paths import pretrained_dir
from genkit.weights import read_safetensors

SHARED = ("text_encoder", "tokenizer")
PROMPT_SEEDS = (1, 2)


def share(part: Path, place: Path) -> None:
    """Put a component where models share it; one that is there already has to be the same.

    Raises:
        SystemExit: if other models use another one.
    """
    weights = "model.safetensors"
    if not place.is_dir():
        shutil.copytree(part, place)
    elif (part / weights).is_file():
        mine, theirs = (read_safetensors(folder / weights) for folder in (part, place))
        if mine.keys() != theirs.keys() or any(not torch.equal(mine[key], theirs[key]) for key in mine):
            raise SystemExit(f"{place} holds other weights than {part}, and other models use them; choose another --text.")


def settings(texts: list[str], known: dict[str, object]) -> dict[str, object]:
    """Return NAME=VALUE texts as a dictionary.

    Args:
        texts: as typed.
        known: settings that exist.

    Raises:
        SystemExit: if a text has no "=", or names a setting that does not exist.
    """
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name not in known or name.startswith("_"):
            raise SystemExit(f"--scheduler {text}: write NAME=VALUE with one of {', '.join(n for n in known if not n.startswith('_'))}.")
        found[name] = yaml.safe_load(value)
    return found


def main() -> None:
    """Parse the command line and write the folders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", help="folder of a trained pipeline")
    parser.add_argument("name", help="name below genkit/pretrained")
    parser.add_argument("--text", help="folder below genkit/pretrained for the shared text encoder and tokenizer")
    parser.add_argument("--summary", required=True, help="what `genkit list` says")
    parser.add_argument("--licence", default="Apache-2.0", help="of the weights, an SPDX identifier")
    parser.add_argument("--prompt", action="append", default=[], help="prompt of the certificate; may be repeated")
    parser.add_argument("--steps", type=int, help="default number of sampling steps")
    parser.add_argument("--guidance-scale", type=float, help="default guidance")
    parser.add_argument("--scheduler", action="append", default=[], metavar="NAME=VALUE", help="setting of the scheduler; may be repeated")
    args = parser.parse_args()
    pipe = GenPipeline.from_pretrained(args.export)
    if args.scheduler:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **settings(args.scheduler, dict(pipe.scheduler.config)))
    defaults = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale}
    pipe.register_to_config(**{key: value for key, value in defaults.items() if value is not None})
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    parameters = sum(p.numel() for module in modules for p in module.parameters())
    memory = pipe.estimate_memory(4).peak / 1e6
    pipe.to(torch.float16)
    shared = {part: f"{args.text}/{part}" for part in SHARED} if args.text else {}
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
    if args.prompt:
        calls = [{"prompt": prompt, "num_images_per_prompt": len(PROMPT_SEEDS), "generator": list(PROMPT_SEEDS)} for prompt in args.prompt]
        certificate.write(folder, calls)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {parameters / 1e6:.2f} M parameters, {size / 1e6:.2f} MB without what it shares")


if __name__ == "__main__":
    main()
