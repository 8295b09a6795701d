"""What a run shows and records: progress bar or plain lines, metrics.jsonl, sample grids, tensorboard and wandb."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from genkit.training.checkpoint import write_text
from genkit.training.config import TrainConfig

if TYPE_CHECKING:
    import numpy as np
    from accelerate import Accelerator


def check_installed(trackers: tuple[str, ...]) -> None:
    """Raise the ImportError that names the extra if a tracker's package is not installed."""
    for name in trackers:
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"train.trackers: {name} is not installed; run `pip install 'genkit-torch[track]'` or leave it out.")


def image_grid(images: Tensor) -> Tensor:
    """Lay pictures out in a near-square grid with a border of two white pixels.

    Args:
        images: [n, 3, h, w] in [-1, 1].

    Returns:
        Picture [rows * (h + 2) + 2, columns * (w + 2) + 2, 3], uint8, on the CPU.

    Raises:
        ValueError: if the shape is another.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(f"image_grid: images must be [n, 3, h, w] with n of at least 1, got {list(images.shape)}.")
    pixels = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)  # n h w 3
    n, h, w, _ = pixels.shape
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    grid = torch.full((rows * (h + 2) + 2, columns * (w + 2) + 2, 3), 255, dtype=torch.uint8)
    for i, picture in enumerate(pixels):
        top, left = 2 + (i // columns) * (h + 2), 2 + (i % columns) * (w + 2)
        grid[top : top + h, left : left + w] = picture
    return grid


class RunLog:
    """Progress and records of a run, written by the main process only; a context manager.

    Args:
        accelerator: of the run.
        project: name in the trackers.
        config: of the run.
        resolved: whole configuration, recorded by wandb.
        first: finished steps at the start; later lines of an earlier, interrupted run are dropped from metrics.jsonl.
    """

    def __init__(self, accelerator: Accelerator, project: str, config: TrainConfig, resolved: dict[str, Any], first: int) -> None:
        self.accelerator, self.is_main = accelerator, accelerator.is_main_process
        self.out, self.steps, self.batch_size = Path(config.out), config.steps, config.batch_size
        self.first, self.started = first, time.perf_counter()
        self.previous = (first, self.started)
        self.metrics_path = self.out / "metrics.jsonl"
        self.bar: Any = None
        if self.is_main:
            _drop_after(self.metrics_path, first)
        options = {"tensorboard": {"purge_step": first + 1}, "wandb": {"config": resolved, "dir": str(self.out)}}
        if config.trackers:
            accelerator.init_trackers(project, init_kwargs={name: options[name] for name in config.trackers})

    def __enter__(self) -> RunLog:
        if self.is_main and sys.stderr.isatty():
            self.bar = _progress_bar(self.steps)
            self.bar.start()
            self.task_id = self.bar.add_task("train", total=self.steps, completed=self.first, speed="", loss="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def advance(self, step: int, losses: Mapping[str, float]) -> None:
        """Move the bar to `step` finished steps."""
        if self.bar is None:
            return
        rate = (step - self.first) / max(time.perf_counter() - self.started, 1e-9)
        loss = "  ".join(f"{name} {value:.4g}" for name, value in losses.items())
        speed = f"{rate:.2f} steps/s  {rate * self.batch_size:.1f} samples/s"
        self.bar.update(self.task_id, completed=step, speed=speed, loss=loss)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step, with the speed since the last record."""
        if not self.is_main:
            return
        now = time.perf_counter()
        rate = (step - self.previous[0]) / max(now - self.previous[1], 1e-9)
        self.previous = (step, now)
        speeds = {"steps_per_second": rate, "samples_per_second": rate * self.batch_size, "seconds": now - self.started}
        values = {**metrics, **speeds}
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        self.accelerator.log(values, step=step)
        if self.bar is None:
            left = _clock((self.steps - step) / max(rate, 1e-9))
            shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items() if name.startswith("loss"))
            self.say(f"step {step}/{self.steps}  {shown}  {rate:.2f} steps/s  {rate * self.batch_size:.1f} samples/s  {left} left")

    def pictures(self, step: int, grids: Mapping[str, Tensor]) -> None:
        """Write sample grids, name -> [n, 3, h, w] in [-1, 1], as out/samples/<name>-<step>.png and to the trackers."""
        from PIL import Image

        arrays: dict[str, np.ndarray[Any, Any]] = {name: image_grid(images).numpy() for name, images in grids.items()}
        (self.out / "samples").mkdir(parents=True, exist_ok=True)
        for name, array in arrays.items():
            Image.fromarray(array).save(self.out / "samples" / f"{name}-{step:08d}.png")
        for tracker in self.accelerator.trackers:
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: array[None] for name, array in arrays.items()}, step=step, **options)

    def say(self, text: str) -> None:
        """Print a line above the bar, in the main process."""
        if not self.is_main:
            return
        if self.bar is not None:
            self.bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)


def _progress_bar(steps: int) -> Any:
    """Build the bar: count, speed, loss, time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    speed, loss = TextColumn("{task.fields[speed]}"), TextColumn("{task.fields[loss]}")
    columns = (BarColumn(), MofNCompleteColumn(), speed, loss, TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), refresh_per_second=4)


def _clock(seconds: float) -> str:
    """Write a duration as h:mm:ss."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _drop_after(path: Path, step: int) -> None:
    """Keep the whole lines of a metrics file up to a step."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            is_kept = json.loads(line)["step"] <= step
        except (json.JSONDecodeError, KeyError, TypeError):
            continue  # cut off when the run was killed
        if is_kept:
            kept.append(line + "\n")
    write_text(path, "".join(kept))
