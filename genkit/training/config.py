"""What a training run is told: one dataclass, checked on entry, and the learning-rate factor it defines."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from genkit.training.evaluation import EvaluationConfig

TRACKERS = ("tensorboard", "wandb")
SCHEDULES = ("constant", "cosine", "whole_cosine", "floored_cosine")
# What may differ between a checkpoint and the run that resumes it; every other field decides the trained weights.
FREE_FIELDS = (
    "out", "steps", "checkpoint_every", "keep_checkpoints", "log_every", "sample_every", "evaluate_every", "evaluate", "trackers",
    "num_workers", "ema_device",
)  # fmt: skip


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key."""


@dataclasses.dataclass
class TrainConfig:
    """Settings of the training loop; learning rates belong to the task, which builds its optimizers.

    Args:
        out: run folder: checkpoints, samples, metrics, export.
        steps: training steps in all, counted from the first run.
        batch_size: samples per step over all processes and accumulated parts.
        seed: decides data order and every draw.
        mixed_precision: autocast type; weights and optimizer states stay as the task built them.
        accumulation: parts that a process cuts its share of a batch into; the result stays that of the whole batch.
        grad_clip: largest gradient norm per optimizer, null for none.
        schedule: course of the learning rate after the warm-up; "whole_cosine" counts from the start of the run, "floored_cosine" does not
            sink below its floor; see the functions of these names.
        warmup: steps of linear warm-up; the first update already has 1 / warmup of the rate.
        warmup_first: where the warm-up of whole_cosine begins, as a fraction of the rate, in [0, 1].
        lr_floor: where the cosines end, as a fraction of the rate, in [0, 1].
        ema_decay: share of the average kept per step, in [0, 1).
        ema_warmup: lower the decay early to (1 + step) / (10 + step).
        ema_device: where the average is kept; "cpu" spares the accelerator's memory, for tasks whose steps do not use the average.
        checkpoint_every: steps between checkpoints.
        keep_checkpoints: how many to keep.
        log_every: steps between lines of metrics.
        sample_every: steps between sample grids, 0 for none.
        evaluate_every: steps between evaluations of the averaged weights, 0 for none.
        evaluate: what they measure.
        trackers: any of tensorboard, wandb; metrics.jsonl is always written.
        num_workers: data loading processes per training process.

    Raises:
        ConfigError: if a value is impossible; names the key.
    """

    out: str
    steps: int
    batch_size: int
    seed: int = 0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    accumulation: int = 1
    grad_clip: float | None = 1.0
    schedule: Literal["constant", "cosine", "whole_cosine", "floored_cosine"] = "constant"
    warmup: int = 0
    warmup_first: float = 0.0
    lr_floor: float = 0.0
    ema_decay: float = 0.999
    ema_warmup: bool = True
    ema_device: Literal["same", "cpu"] = "same"
    checkpoint_every: int = 1000
    keep_checkpoints: int = 3
    log_every: int = 50
    sample_every: int = 0
    evaluate_every: int = 0
    evaluate: EvaluationConfig | None = None
    trackers: tuple[str, ...] = ()
    num_workers: int = 0

    def __post_init__(self) -> None:
        for key in ("steps", "batch_size", "accumulation", "checkpoint_every", "keep_checkpoints", "log_every"):
            _require(key, getattr(self, key), getattr(self, key) >= 1, "at least 1")
        for key in ("seed", "warmup", "sample_every", "evaluate_every", "num_workers"):
            _require(key, getattr(self, key), getattr(self, key) >= 0, "at least 0")
        _require("out", self.out, bool(self.out), "a folder")
        _require("mixed_precision", self.mixed_precision, self.mixed_precision in ("no", "bf16", "fp16"), "no, bf16 or fp16")
        _require("schedule", self.schedule, self.schedule in SCHEDULES, "one of " + ", ".join(SCHEDULES))
        _require("warmup", self.warmup, self.warmup <= self.steps, f"at most train.steps={self.steps}")
        for key in ("lr_floor", "warmup_first"):
            _require(key, getattr(self, key), 0 <= getattr(self, key) <= 1, "in [0, 1]")
        is_used = self.schedule == "whole_cosine" or self.warmup_first == 0
        _require("warmup_first", self.warmup_first, is_used, "0 for schedules other than whole_cosine")
        _require("ema_decay", self.ema_decay, 0 <= self.ema_decay < 1, "in [0, 1)")
        _require("ema_device", self.ema_device, self.ema_device in ("same", "cpu"), "same or cpu")
        _require("evaluate", self.evaluate, not self.evaluate_every or self.evaluate is not None, "given where train.evaluate_every is")
        clip = self.grad_clip
        _require("grad_clip", clip, clip is None or (clip > 0 and math.isfinite(clip)), "above 0, or null for no clipping")
        is_whole = self.batch_size % self.accumulation == 0
        _require("batch_size", self.batch_size, is_whole, f"a multiple of train.accumulation={self.accumulation}")
        for name in self.trackers:
            _require("trackers", name, name in TRACKERS, f"any of {', '.join(TRACKERS)}")

    def lr_factor(self, step: int) -> float:
        """Return the learning-rate factor of the update after `step` finished steps, in [0, 1].

        (step + 1) / warmup while warming up, then 1, or floor + (1 - floor) (1 + cos(pi t)) / 2 with t from 0 to 1 over the rest.
        """
        if self.schedule == "whole_cosine":
            return whole_cosine(step / self.steps, self.warmup / self.steps, self.warmup_first, self.lr_floor)
        if self.schedule == "floored_cosine":
            return floored_cosine(step, self.warmup, self.steps, self.lr_floor)
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.schedule == "constant":
            return 1.0
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr_floor + (1 - self.lr_floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))

    def differences(self, saved: dict[str, Any]) -> list[str]:
        """Name the settings that decide the weights and differ from those a checkpoint was trained with."""
        free = set(FREE_FIELDS) - ({"steps"} if self.schedule != "constant" else set())
        return differences("train", {key: saved[key] for key in saved if key not in free}, plain(self))


def floored_cosine(step: int, warmup: int, steps: int | None, floor: float) -> float:
    """Return a learning-rate factor that rises from 0 in `warmup` steps and follows a cosine to 0 at `steps`, but not below the floor.

    Args:
        step: finished steps.
        warmup: steps of the rise.
        steps: of the whole run; None stays at 1.
        floor: least factor after the rise.

    Source: the released training code of SimVQ (arXiv 2411.02038).
    """
    if step < warmup:
        return step / warmup
    if steps is None:
        return 1.0
    return floor if step >= steps else max(floor, 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))))


def whole_cosine(progress: float, warm: float, first: float, floor: float) -> float:
    """Return a learning-rate factor that rises in a line from `first` to 1 and then follows a cosine that began with the run.

    Args:
        progress: share of the run that is done.
        warm: share of the run that warms up.
        first: factor at the start.
        floor: factor at the end.

    Source: the released training code of MeshAnything V2 (arXiv 2408.02555).
    """
    if warm > 0 and progress <= warm:
        return first + progress / warm * (1 - first)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def _require(key: str, value: object, is_valid: bool, expected: str) -> None:
    """Raise the error of an impossible value."""
    if not is_valid:
        raise ConfigError(f"train.{key} must be {expected}, got {value!r}.")


def differences(where: str, saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Say which values both of two configurations have and do not agree on."""
    return [f"{where}.{key} is {saved[key]} there and {here[key]} here" for key in saved if key in here and saved[key] != here[key]]


def plain(value: Any) -> Any:
    """Turn dataclasses, tuples, paths and enums into what YAML and JSON write: dicts, lists, strings and numbers."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value
