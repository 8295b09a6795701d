"""Video models side by side: prediction of what follows, and the tasks of turntables.

    python eval/video.py predict --sprites digits.npy --num-frames 10 --models runs/predformer/export runs/mimo_vp/export runs/vdt/export
    python eval/video.py turntables --data data/lowpoly/test.parquet --model genkit/vdt-lowpoly --predictor runs/predformer/export
    python eval/video.py samplers --data data/lowpoly/train.parquet --model genkit/vdt-lowpoly --samplers dpm-solver++:20 ddpm:250

`predict`: given frames to as many future ones, every model and a copy of the last frame; means per frame as the papers take them (MSE and
MAE sum over pixels; SSIM with range 1, and with range 2 as OpenSTL prints it). `turntables`: animate, predict, interpolate, complete, and
generation from text; PSNR over what was made, SSIM over the frames that hold it, against the true views, beside copying the nearest given
frame and blending linearly; the distance of generated clips is Frechet's on features of frames, not FVD. `samplers`: that distance by
scheduler and steps, same captions and seeds.

"""

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import genkit
from genkit import GenPipeline
from genkit.data.clips import ClipDataset, open_clips
from genkit.data.video_masks import block_mask
from genkit.eval.assets import bootstrap_mean
from genkit.eval.clips import FrameFeatures
from genkit.eval.features import FeatureNetwork
from genkit.eval.frechet import GaussianStatistics, frechet_distance
from genkit.eval.prediction import METRICS, blend, prediction_metrics, restoration_metrics
from genkit.schedulers.named import on_the_chain_of
from genkit.tasks._clips import training_clips

Predictor = Callable[[Tensor, int], Tensor]


def predictor_of(folder: str, steps: int | None) -> Predictor:
    """Return (given frames [b, f, c, h, w], seed) -> as many future frames, of a predictor's folder or a video pipeline."""
    config = Path(folder) / "config.json"
    if config.is_file():
        model = getattr(genkit, json.loads(config.read_text())["_class_name"]).from_pretrained(folder).eval()
        return lambda given, seed: model(given).frames
    pipe: Any = GenPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)

    def predict(given: Tensor, seed: int) -> Tensor:
        b, f, c = given.shape[:3]
        options: dict[str, Any] = {"num_inference_steps": steps, "num_images_per_prompt": b, "samples_at_once": b, "output_type": "pt"}
        made = pipe(frames=given.expand(-1, -1, 3, -1, -1), num_frames=2 * f, generator=list(range(seed, seed + b)), **options).frames
        return made[:, f:].mean(2, keepdim=True) if c == 1 else made[:, f:]

    return predict


def predict(args: argparse.Namespace) -> None:
    """Print the table of predictors."""
    f = args.num_frames
    clips = training_clips(args.data, args.sprites, args.image_size, 2 * f, args.stride, 1_000_000, args.seed)
    models: dict[str, Predictor] = {"copy of the last frame": lambda given, seed: given[:, -1:].expand_as(given)}
    models |= {name: predictor_of(name, args.steps) for name in args.models}
    count = min(args.num_clips, len(clips))
    table = {}
    for name, model in models.items():
        rows: dict[str, list[Tensor]] = {metric: [] for metric in METRICS}
        seconds = 0.0
        for start in range(0, count, args.batch_size):
            batch = torch.stack([clips[i]["frames"] for i in range(start, min(start + args.batch_size, count))])
            began = time.perf_counter()
            found = model(batch[:, :f], start)
            seconds += time.perf_counter() - began
            for metric, values in prediction_metrics(found, batch[:, f:]).items():
                rows[metric].append(values.mean(1))
        table[name] = {metric: float(torch.cat(values).mean()) for metric, values in rows.items()} | {"seconds": seconds / count}
    if args.json:
        print(json.dumps(table))
        return
    print(f"{count} clips, {f} frames given and {f} predicted, {args.image_size} px, {torch.get_num_threads()} threads")
    print("| model | MSE | MAE | PSNR | SSIM | SSIM (OpenSTL) | s per clip |\n|---|---|---|---|---|---|---|")
    for name, r in table.items():
        values = f"{r['mse']:.1f} | {r['mae']:.1f} | {r['psnr']:.2f} | {r['ssim']:.3f} | {r['ssim-openstl']:.3f}"
        print(f"| {label(name)} | {values} | {r['seconds']:.3f} |")


def label(name: str) -> str:
    """Return the short name of a run's export folder."""
    return Path(name).parent.name if Path(name).name == "export" else name


def task_masks(frames: int, side: int) -> dict[str, Tensor]:
    """Return the masks [f, h, w] of the tasks, True = to be made."""
    hidden = torch.ones(4, frames, side, side, dtype=torch.bool)
    hidden[0, 0] = False
    hidden[1, : frames // 2] = False
    hidden[2, [round(i * (frames - 1) / 3) for i in range(4)]] = False
    region = block_mask(side // 8, side // 8, 0.5, random.Random(0)).repeat_interleave(8, 0).repeat_interleave(8, 1)
    hidden[3] = False
    hidden[3, 2:-2] = region
    return dict(zip(("animate", "predict", "interpolate", "complete"), hidden, strict=True))


def turntables(args: argparse.Namespace) -> None:
    """Print the table of tasks, and the distance of generated clips."""
    pipe: Any = GenPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    frames, (side, _) = pipe.transformer.config["num_frames"], pipe.image_size
    clips = open_clips(args.data, side, frames)
    count = min(args.num_clips, len(clips))
    truth = torch.stack([clips[i]["frames"] for i in range(count)])
    masks = task_masks(frames, side)
    options: dict[str, Any] = {"num_inference_steps": args.steps, "output_type": "pt", "guidance_scale": args.guidance_scale}
    methods: dict[str, Callable[[int, Tensor], Tensor]] = {
        label(args.model): lambda i, mask: made_by(pipe, clips, truth[i], i, mask, options),
        "copy the nearest": lambda i, mask: blend(truth[i : i + 1], mask[None], hold=True)[0],
        "blend linearly": lambda i, mask: blend(truth[i : i + 1], mask[None])[0],
    }
    if args.predictor is not None:
        half = predictor_of(args.predictor, None)
        methods[label(args.predictor)] = lambda i, mask: torch.cat([truth[i, : frames // 2], half(truth[i : i + 1, : frames // 2], 0)[0]])
    print(f"{count} turntables, {frames} frames, {side} px, {torch.get_num_threads()} threads")
    print("| task | method | PSNR over what was made | SSIM |\n|---|---|---|---|")
    for task, mask in masks.items():
        for name, method in methods.items():
            if args.predictor is not None and name == label(args.predictor) and task != "predict":
                continue
            found = [restoration_metrics(method(i, mask), truth[i], mask) for i in range(count)]
            cells = [bootstrap_mean(torch.stack([row[key] for row in found]), list(range(count))) for key in ("psnr", "ssim")]
            text = [
                f"{cell.value:.{digits}f} [{cell.low:.{digits}f}, {cell.high:.{digits}f}]"
                for cell, digits in zip(cells, (2, 3), strict=True)
            ]
            print(f"| {task} | {name} | {text[0]} | {text[1]} |", flush=True)
    generation(args, pipe, open_clips(args.train, side, frames) if args.train else clips, frames, options)


def made_by(pipe: Any, clips: ClipDataset, truth: Tensor, index: int, mask: Tensor, options: dict[str, Any]) -> Tensor:
    """Let a pipeline restore what a mask hides of a clip, told the caption where it takes text."""
    prompt = clips.captions[index] if pipe.is_text_model else None
    settings = options if prompt else {key: value for key, value in options.items() if key != "guidance_scale"}
    return pipe(prompt, frames=truth, mask=mask, generator=[index], **settings).frames[0]


def generation(args: argparse.Namespace, pipe: Any, real: ClipDataset, frames: int, options: dict[str, Any]) -> None:
    """Print the Frechet distance of clips from text, of one half of the real ones to the other, and of still clips."""
    features = FrameFeatures(FeatureNetwork("efficientnet-lite0", size=None))
    count = min(len(real), args.num_generated)
    everything = [real[i]["frames"] for i in range(len(real))]
    rows = {"real": [features(to_bytes(clip)[None]) for clip in everything]}
    rows["still"] = [features(to_bytes(clip[:1].expand_as(clip))[None]) for clip in everything[:count]]
    rows["generated"] = generated(pipe, real, count, features, options)
    stats = {}
    for name, parts in {**rows, "even": rows["real"][::2], "odd": rows["real"][1::2]}.items():
        stats[name] = GaussianStatistics(parts[0].shape[1], features.source(frames))
        stats[name].update(torch.cat(parts))
    print(f"\n{count} generated clips against {len(real)} real ones: {features.source(frames)}")
    for text, a, b in (
        ("generated", "generated", "real"),
        ("real first frames, standing still", "still", "real"),
        ("real, halves", "even", "odd"),
    ):
        print(f"- {text}: {frechet_distance(stats[a], stats[b]):.1f}")


def generated(pipe: Any, real: ClipDataset, count: int, features: FrameFeatures, options: dict[str, Any]) -> list[Tensor]:
    """Return the features of clips made from the captions of the first real ones, seed i for clip i."""
    found = []
    for i in range(count):
        prompt = real.captions[i] if pipe.is_text_model else None
        made = pipe(prompt, generator=[i], **(options if prompt else {**options, "guidance_scale": None})).frames
        found.append(features(to_bytes(made[0])[None]))
    return found


def samplers(args: argparse.Namespace) -> None:
    """Print the distance of generated clips by scheduler and steps."""
    pipe: Any = GenPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    frames, (side, _) = pipe.transformer.config["num_frames"], pipe.image_size
    real, features = open_clips(args.data, side, frames), FrameFeatures(FeatureNetwork("efficientnet-lite0", size=None))
    reference: GaussianStatistics | None = None
    count = min(len(real), args.num_generated)
    print(f"{count} generated clips against {len(real)} real ones: {features.source(frames)}; {torch.get_num_threads()} threads")
    print("| scheduler | steps | Frechet distance | s per clip |\n|---|---|---|---|")
    for text in args.samplers:
        name, _, steps = text.partition(":")
        pipe.scheduler = on_the_chain_of(pipe, name)
        options = {"num_inference_steps": int(steps or 20), "output_type": "pt", "guidance_scale": args.guidance_scale}
        began = time.perf_counter()
        rows = generated(pipe, real, count, features, options)
        seconds = (time.perf_counter() - began) / count
        stats = GaussianStatistics(rows[0].shape[1], features.source(frames))
        stats.update(torch.cat(rows))
        if reference is None:
            reference = GaussianStatistics(rows[0].shape[1], features.source(frames))
            for i in range(len(real)):
                reference.update(features(to_bytes(real[i]["frames"])[None]))
        print(f"| {name} | {steps or 20} | {frechet_distance(stats, reference):.1f} | {seconds:.2f} |", flush=True)


def to_bytes(clip: Tensor) -> Tensor:
    """Return pixels as uint8 of frames in [-1, 1]."""
    return ((clip.clamp(-1, 1) + 1) * 127.5).round().byte()


@torch.inference_mode()
def main() -> None:
    """Parse the command line, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True)
    first = kinds.add_parser("predict", help="given frames to as many future ones")
    first.add_argument("--data", help="clips, as a recipe names them")
    first.add_argument("--sprites", help="digits or other sprites that move as in Moving MNIST")
    first.add_argument("--models", nargs="*", default=[], help="folders of predictors and video pipelines")
    first.add_argument("--num-frames", type=int, default=10)
    first.add_argument("--image-size", type=int, default=64)
    first.add_argument("--stride", type=int, default=1)
    first.add_argument("--num-clips", type=int, default=200)
    first.add_argument("--batch-size", type=int, default=10)
    first.add_argument("--steps", type=int, help="sampling steps of pipelines; their own if left out")
    first.add_argument("--seed", type=int, default=1, help="of the sprites' ways; a recipe's is 0")
    first.add_argument("--json", action="store_true")
    first.set_defaults(run=predict)
    second = kinds.add_parser("turntables", help="the tasks of a turntable model")
    second.add_argument("--model", required=True)
    second.add_argument("--data", required=True, help="parquet file of turntables to restore")
    second.add_argument("--train", help="parquet file of turntables that generated clips are compared with; --data if left out")
    second.add_argument("--predictor", help="folder of a predictor of half a turn")
    second.add_argument("--num-clips", type=int, default=1000)
    second.add_argument("--num-generated", type=int, default=1000)
    second.add_argument("--steps", type=int)
    second.add_argument("--guidance-scale", type=float)
    second.set_defaults(run=turntables)
    third = kinds.add_parser("samplers", help="schedulers and steps of generation")
    third.add_argument("--model", required=True)
    third.add_argument("--data", required=True, help="clips that generated ones are compared with")
    third.add_argument("--samplers", nargs="+", default=["dpm-solver++:20", "ddpm:250"], help="name:steps, as many as wanted")
    third.add_argument("--num-generated", type=int, default=200)
    third.add_argument("--guidance-scale", type=float)
    third.set_defaults(run=samplers)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
