"""`genkit video`: clips from frames, text or nothing, as animations or films, with a sheet of what was given and what was made."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genkit.cli._models import check_model
from genkit.cli._output import add_json, positive, print_json
from genkit.cli._sampling import add_sampling, check_out_folder, choose_seeds, load_pipeline, sampling_options

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    Frames = np.ndarray[Any, np.dtype[np.uint8]]

HELP = "make, continue, interpolate, animate and complete clips"

DEFAULT_MODEL = "genkit/vdt-lowpoly"
WORDS = ("generate", "predict", "backward", "interpolate", "animate", "complete")
SUFFIXES = (".gif", ".webp", ".png", ".mp4", ".webm", ".mov", ".mkv", ".avi", "")
COLUMNS = 16  # frames in a row of the sheet
GREY = 160  # of what is to be made, in the sheet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("prompt", nargs="?", help="what to show, for models that take text or classes; quote it")
    add("--model", default=DEFAULT_MODEL, help="packaged name, folder or official file, see `genkit list` (default: %(default)s)")
    add("--frames", type=Path, metavar="PATH", help="what is given: a picture, GIF, WebP, film (extra `video`) or folder of frames")
    add("--task", choices=WORDS, help="what to do with the frames (default: predict with --frames, generate without)")
    add("--mask", type=Path, metavar="PATH", help="for complete: picture or clip, white is made anew; a picture holds for all frames")
    add("--resize", action="store_true", help="bring the frames to the model's size first")
    add("--num-clips", type=positive, default=1, metavar="N", help="clips (default: %(default)s)")
    add("--num-frames", type=positive, metavar="N", help="frames of a clip (default: the model's); more go on window by window")
    add("--overlap", type=positive, metavar="N", help="frames that a window takes from the one before (default: half a window)")
    add("--scheduler", metavar="NAME", help="ddpm, ddim, dpm-solver++, unipc, ... or a scheduler class of diffusers (default: the model's)")
    add("--fps", type=rate, metavar="R", help="frames per second (default: those of --frames, else 8)")
    add(
        "--out", type=Path, default=Path("clip.gif"), metavar="PATH", help=".gif, .webp, .png, .mp4, ... or a folder (default: %(default)s)"
    )
    add("--sheet", type=Path, metavar="FILE", help="contact sheet, a .png (default: beside the clip)")
    add_sampling(parser, "clip")
    add_json(parser)


def rate(text: str) -> float:
    """Parse frames per second (an argparse type)."""
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value < 1000:
        raise argparse.ArgumentTypeError(f"must be a number above 0 and below 1000, got {text!r}")
    return value


def run(args: argparse.Namespace) -> int:
    """Make the clips, write them and their sheet, and say where and how long it took."""
    check(args)
    from genkit.data.video_files import read_clip, write_clip

    frames, fps = read_clip(args.frames) if args.frames is not None else (None, None)
    masks = read_clip(args.mask)[0][..., 0] > 127 if args.mask is not None else None
    began = time.perf_counter()
    pipe = load_pipeline(args)
    loaded = time.perf_counter()
    frames, mask = fit(args, pipe, frames, masks)
    seeds = choose_seeds(args, args.num_clips)
    if args.scheduler is not None:
        from genkit.schedulers.named import on_the_chain_of

        pipe.scheduler = on_the_chain_of(pipe, args.scheduler)
    given: dict[str, Any] = {"frames": frames, "mask": mask, "num_frames": args.num_frames, "overlap": args.overlap}
    clips = pipe(args.prompt, generator=seeds, num_images_per_prompt=args.num_clips, **given, **sampling_options(args)).frames
    done = time.perf_counter()
    paths = (
        [args.out] if len(clips) == 1 else [args.out.with_name(f"{args.out.stem}_{i + 1:02d}{args.out.suffix}") for i in range(len(clips))]
    )
    for path, clip in zip(paths, clips, strict=True):
        write_clip(path, clip, args.fps or fps or 8.0)
    sheet = args.sheet or args.out.with_name(f"{args.out.stem}-sheet.png")
    write_sheet(sheet, clips, before(frames, mask, len(clips[0])), args, seeds)
    report(args, paths, sheet, seeds, len(clips[0]), str(pipe.device), {"load": loaded - began, "generate": done - loaded})
    return 0


def check(args: argparse.Namespace) -> None:
    """Refuse what can be known to be wrong before anything large is imported.

    Raises:
        ValueError: for options that do not go together, or an unknown model or format.
        FileNotFoundError: for a file or folder that is not there.
    """
    if args.out.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--out must end in {', '.join(SUFFIXES[:-1])}, or in nothing for a folder of frames, got {str(args.out)!r}.")
    if args.sheet is not None and args.sheet.suffix.lower() != ".png":
        raise ValueError(f"--sheet must end in .png, got {str(args.sheet)!r}.")
    for path in (args.frames, args.mask):
        if path is not None and not path.exists():
            raise FileNotFoundError(f"there is nothing at {str(path)!r}.")
    if args.frames is None and (args.mask is not None or args.resize or args.task not in (None, "generate")):
        raise ValueError("--mask, --resize and --task say what to do with frames; give --frames too.")
    if (args.task == "complete") != (args.mask is not None):
        raise ValueError("--task complete and --mask belong together: the clip, and where to make it anew (white); give both.")
    if args.prompt is not None and not args.prompt.strip():
        raise ValueError("prompt is empty; say what to show, or leave it out.")
    check_out_folder(args.out)
    check_model(args.model)


def fit(args: argparse.Namespace, pipe: Any, frames: Frames | None, masks: Any) -> tuple[Frames | None, Any]:
    """Return frames at the model's size, and what a call takes as `mask`.

    Raises:
        ValueError: if the model makes no clips, the frames need --resize, or the mask has another size or length.
    """
    import numpy as np
    import torch
    from PIL import Image

    if not hasattr(pipe, "prepare_frames"):
        raise ValueError(f"{args.model} is a {type(pipe).__name__}, which makes no clips; `genkit list` says what each model makes.")
    if frames is None:
        return None, args.task
    height, width = pipe.image_size
    if masks is not None:
        if masks.shape[1:] != frames.shape[1:3] or len(masks) not in (1, len(frames)):
            sizes = f"{masks.shape[2]}x{masks.shape[1]} of {len(masks)}, {frames.shape[2]}x{frames.shape[1]} of {len(frames)}"
            raise ValueError(f"--mask must be as large as the frames, one picture or one per frame; got (mask, frames) {sizes}.")
        masks = np.broadcast_to(masks, (len(frames), *masks.shape[1:]))
    if frames.shape[1:3] != (height, width):
        if not args.resize:
            got = f"{frames.shape[2]}x{frames.shape[1]}"
            raise ValueError(f"--frames are {got} pixels, the model was trained on {width}x{height}; add --resize to bring them there.")
        frames = np.stack([np.asarray(Image.fromarray(f).resize((width, height), Image.Resampling.LANCZOS)) for f in frames])
        if masks is not None:
            masks = np.stack([np.asarray(Image.fromarray(m).resize((width, height), Image.Resampling.NEAREST)) for m in masks])
    return frames, torch.from_numpy(np.array(masks)) if masks is not None else args.task


def before(frames: Frames | None, mask: Any, total: int) -> Frames | None:
    """Return the clip as it was given [f, h, w, 3], grey where it is to be made; None for generation."""
    import numpy as np
    from torch import Tensor

    from genkit.pipelines.clips import place_frames

    if frames is None:
        return None
    if isinstance(mask, Tensor):
        return np.where(mask.numpy()[..., None], np.uint8(GREY), frames)
    clip = np.full((total, *frames.shape[1:]), GREY, np.uint8)
    clip[place_frames(len(frames), mask or "predict", total)] = frames
    return clip


def write_sheet(path: Path, clips: list[list[Image]], given: Frames | None, args: argparse.Namespace, seeds: list[int]) -> None:
    """Write rows of frames: what was given, then every clip."""
    from PIL import Image

    from genkit.cli._pictures import grid, save_png

    total = len(clips[0])
    columns = min(total, COLUMNS)
    places = [round(i * (total - 1) / max(columns - 1, 1)) for i in range(columns)]
    rows = ([[Image.fromarray(frame) for frame in given]] if given is not None else []) + clips
    notes = {"Software": "genkit", "model": args.model, "prompt": args.prompt or "", "seeds": f"{seeds[0]} to {seeds[-1]}"}
    save_png(grid([row[place] for row in rows for place in places], columns), path, notes)


def report(
    args: argparse.Namespace, paths: list[Path], sheet: Path, seeds: list[int], frames: int, device: str, seconds: dict[str, float]
) -> None:
    """Say what was written, from which seeds, and how long it took."""
    if args.json:
        rounded = {key: round(value, 3) for key, value in seconds.items()}
        files = {"clips": [str(path) for path in paths], "sheet": str(sheet)}
        print_json({**files, "model": args.model, "frames": frames, "seeds": seeds, "device": device, "seconds": rounded})
        return
    clips = (
        f"1 clip of {frames} frames, seed {seeds[0]}"
        if len(seeds) == 1
        else f"{len(seeds)} clips of {frames} frames, seeds {seeds[0]} to {seeds[-1]}"
    )
    print(f"wrote {', '.join(map(str, paths))}: {clips}")
    print(f"wrote {sheet}: {'what was given, then ' if args.frames is not None else ''}what was made")
    print(f"{seconds['generate']:.1f} s to generate, {seconds['load']:.1f} s to load {args.model} on {device}")
