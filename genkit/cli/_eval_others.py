"""The evaluations of `genkit eval` beside the feature metrics: CLIP, reconstructions, clips, meshes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genkit.checks import choose
from genkit.cli._output import positive, print_json, print_table

if TYPE_CHECKING:
    from genkit.eval.lpips import LPIPS
    from genkit.eval.pictures import Source

OTHERS = ("cmmd", "clip-score", "reconstruction", "fvd", "mesh")
INPUTS = {
    "cmmd": ("REAL", "FAKE"),
    "clip-score": ("FAKE",),
    "reconstruction": ("ORIGINALS", "RECONSTRUCTIONS"),
    "fvd": ("REAL", "FAKE"),
    "mesh": ("TRUE", "PREDICTED"),
}


def add_other_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of these evaluations."""
    add = parser.add_argument
    add("--clip", metavar="MODEL", help="cmmd, clip-score: a CLIP of transformers, folder or hub id")
    add(
        "--lpips",
        choices=("alex", "vgg", "squeeze"),
        help="reconstruction: also LPIPS on this network, with --lpips-trunk and --lpips-heads",
    )
    add("--lpips-trunk", type=Path, metavar="FILE", help="torchvision's weights of that network")
    add("--lpips-heads", type=Path, metavar="FILE", help="the published linear heads")
    add("--i3d", type=Path, metavar="FILE", help="fvd: weights of I3D, i3d_pretrained_400.pt")
    add(
        "--video-protocol",
        default="stylegan-v",
        help="fvd: how clips are prepared: stylegan-v, videogpt, cd-fvd, original (default: %(default)s)",
    )
    add("--frames", type=positive, default=16, metavar="N", help="fvd: frames of a clip (default: %(default)s)")
    add("--stride", type=positive, default=1, metavar="N", help="fvd: step between frames (default: %(default)s)")
    add("--points", type=positive, default=10_000, metavar="N", help="mesh: points sampled on each (default: %(default)s)")


def read_prompts(path: Path) -> list[str]:
    """Return the lines of a text file that are not blank.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--prompts: {str(path)!r} does not exist; give a text file with one prompt per line.")
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def run_other(args: argparse.Namespace) -> int:
    """Check the inputs and do what is asked for."""
    wanted = INPUTS[args.action]
    if len(args.inputs) != len(wanted):
        given = f"{len(args.inputs)}: {' '.join(args.inputs) or 'nothing'}"
        raise ValueError(f"genkit eval {args.action} takes {' '.join(wanted)}, got {given}.")
    run = {"cmmd": run_clip, "clip-score": run_clip, "reconstruction": run_reconstruction, "fvd": run_fvd, "mesh": run_mesh}
    return run[args.action](args)


def _open(args: argparse.Namespace, path: str) -> Source:
    from genkit.eval.pictures import open_source

    return open_source(path, background=args.background, split=args.split, view_size=args.view_size)


def run_clip(args: argparse.Namespace) -> int:
    """Compute CMMD, or the CLIP score against the pictures' labels (folder names, captions) or --prompts, one per picture."""
    if args.clip is None:
        raise ValueError(
            f"genkit eval {args.action} needs --clip MODEL, a CLIP of transformers (openai/clip-vit-large-patch14-336 is usual)."
        )
    from genkit.cli._models import pick_device
    from genkit.eval import clip
    from genkit.eval.extract import extract

    sources = [_open(args, path) for path in args.inputs]
    extractor = clip.ClipExtractor(args.clip, pick_device(args.device))
    options: dict[str, Any] = {"batch_size": args.batch_size, "workers": args.workers, "skip_bad": args.skip_bad, "cache": args.cache}
    features = [extract(source, extractor, ["image"], **options) for source in sources]
    if args.action == "cmmd":
        result = clip.cmmd(features[0], features[1], extractor, not args.no_ci)
    else:
        texts = [label.replace("_", " ") for label in features[0].labels]
        if args.prompts is not None:
            texts = read_prompts(args.prompts)
        result = clip.clip_score(features[0], texts, extractor)
    print_json(result.to_dict()) if args.json else print(result)
    return 0


def run_reconstruction(args: argparse.Namespace) -> int:
    """Measure pairs of pictures."""
    from genkit.eval.pairs import compare

    given = (args.lpips, args.lpips_trunk, args.lpips_heads)
    if any(value is not None for value in given) and None in given:
        raise ValueError("LPIPS needs --lpips NETWORK, --lpips-trunk FILE and --lpips-heads FILE; give all three.")
    originals, reconstructions = (_open(args, path) for path in args.inputs)
    _print(args, {"": compare(originals, reconstructions, load_lpips(args) if args.lpips else None)})
    return 0


def load_lpips(args: argparse.Namespace) -> LPIPS:
    """Load the distance from the user's files."""
    from genkit.eval.lpips import LPIPS
    from genkit.weights import read_checkpoint

    return LPIPS(args.lpips, read_checkpoint(args.lpips_trunk)[0], read_checkpoint(args.lpips_heads)[0])


def run_fvd(args: argparse.Namespace) -> int:
    """Compute the Frechet video distance, or with --network a Frechet distance of clips on a picture network's features."""
    if (args.i3d is None) == (args.network is None):
        raise ValueError(
            "genkit eval fvd needs --i3d FILE, the weights of I3D (i3d_pretrained_400.pt), or --network efficientnet-lite0 for a "
            "distance on features of frames, which is not FVD; give one of them."
        )
    from genkit.cli._models import pick_device
    from genkit.eval.clips import ClipFeatures, Clips, FrameFeatures, I3DFeatures, frechet_clip_distance
    from genkit.eval.features import FeatureNetwork
    from genkit.eval.i3d import I3D
    from genkit.eval.video import PREPARATIONS
    from genkit.weights import read_checkpoint

    choose(args.video_protocol, PREPARATIONS, "video protocol")
    real, fake = (Clips(path, args.frames, args.stride) for path in args.inputs)
    device, notes = pick_device(args.device), []
    if args.i3d is not None:
        features: ClipFeatures = I3DFeatures(I3D(read_checkpoint(args.i3d)[0]).to(device), args.video_protocol)
    else:
        features = FrameFeatures(FeatureNetwork(args.network), device)
        notes.append("this is a Frechet distance of clips on features of frames, not FVD: comparable with its own kind only")
    if min(len(real), len(fake)) < 2048:
        notes.append("2,048 clips of each set are usual; fewer raise the distance")
    value, ci = frechet_clip_distance(real, fake, features)
    protocol = {"name": args.video_protocol if args.i3d is not None else args.network, "frames": args.frames, "stride": args.stride}
    found: dict[str, Any] = {"metric": features.metric, "value": value, "ci": list(ci) if ci else None, "protocol": protocol}
    found |= {"num_real": len(real), "num_fake": len(fake), "warnings": notes}
    if args.json:
        print_json(found)
    else:
        interval = f" [{ci[0]:.6g}, {ci[1]:.6g}]" if ci else ""
        print(f"{features.metric} {value:.6g}{interval} ({features.source(args.frames)}; {len(real)} real, {len(fake)} generated)")
        for note in notes:
            print(f"  note: {note}")
    return 0


def run_mesh(args: argparse.Namespace) -> int:
    """Measure meshes."""
    from genkit.eval.meshes import compare_files

    true, predicted = map(Path, args.inputs)
    for path in (true, predicted):
        if not path.exists():
            raise FileNotFoundError(f"{str(path)!r} does not exist; give a mesh file or a folder of them.")
    found = compare_files(true, predicted, args.points, args.seed)
    _print(args, {name: {metric: {"value": value} for metric, value in values.items()} for name, values in found.items()})
    return 0


def _print(args: argparse.Namespace, found: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Print values by name and metric, and their mean where there are several names."""
    if args.json:
        print_json(found[""] if list(found) == [""] else found)
        return
    rows = []
    for name, values in found.items():
        for metric, entry in values.items():
            interval = f"[{entry['ci'][0]:.4g}, {entry['ci'][1]:.4g}]" if entry.get("ci") else ""
            notes = ", ".join(str(entry[key]) if key == "note" else f"{entry[key]} equal" for key in ("note", "equal") if key in entry)
            rows.append([name, metric, f"{entry['value']:.6g}", interval, notes])
    if len(found) > 1:
        for metric in next(iter(found.values())):
            numbers = [entry[metric]["value"] for entry in found.values() if metric in entry]
            rows.append(["mean", metric, f"{sum(numbers) / len(numbers):.6g}", "", f"{len(numbers)} meshes"])
    print_table(("name", "metric", "value", "95 % interval", "notes"), rows)
