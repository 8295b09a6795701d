"""The one training loop, for every task: accelerate for devices, precision and processes; EMA, clipping, schedules, checkpoints.

A run is a function of (task, seed, batch size): data order and draws depend on (seed, step) alone, torch's default generator is
seeded anew at each step, and a checkpoint holds weights, averages, optimizer states and the step. So a resumed run continues bit
for bit, and several processes or accumulated parts compute what one process computes on the whole batch (up to summation order;
dropout draws its own stream per process).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import signal
import time
from collections.abc import Iterator, Sequence, Sized
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, ProjectConfiguration, send_to_device
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from genkit.checks import choose
from genkit.training import checkpoint, evaluation
from genkit.training.config import ConfigError, TrainConfig, differences, plain
from genkit.training.ema import EMA
from genkit.training.sampler import GlobalBatchSampler, fold_seed
from genkit.training.signals import StopRequest, ignore_interrupts
from genkit.training.task import Batch, Phase, StepContext, Task, check_owned, split
from genkit.training.trackers import RunLog, check_installed

SAMPLE_BATCH = 16  # pictures in a sample grid


class NonFiniteError(RuntimeError):
    """A loss or gradient became nan or infinite; no parameter of the named optimizer was changed by it."""


@dataclasses.dataclass
class TrainResult:
    """How a run ended.

    Attributes:
        step: finished steps.
        steps: steps asked for.
        num_processes: training processes of this run.
        seconds: this run took.
        losses: of the last step, by optimizer.
        out: run folder.
        stopped_by: number of the signal that stopped it, or None.
    """

    step: int
    steps: int
    num_processes: int
    seconds: float
    losses: dict[str, float]
    out: str
    stopped_by: int | None = None


class Trainer:
    """Train a task.

    Args:
        task: what to train.
        config: how.
        resolved: the whole configuration of the recipe, saved beside the run; that of the training alone if None.

    Raises:
        ImportError: if a tracker's package is missing.
        TypeError, ValueError: if the data set has no length or no samples.
    """

    def __init__(self, task: Task, config: TrainConfig, resolved: dict[str, Any] | None = None) -> None:
        check_installed(config.trackers)
        if config.evaluate is not None and config.evaluate_every:
            task.check_evaluation(config.evaluate)
        self.task, self.config, self.out = task, config, Path(config.out)
        self.resolved = plain(resolved) if resolved is not None else {"task": task.name, "train": plain(config)}
        self.stop_request, self.stopped_by = StopRequest(), 0
        self.notices: list[str] = []
        self.dataset = task.dataset()
        if not isinstance(self.dataset, Sized):
            raise TypeError(f"task {task.name!r}: dataset() must be map-style, with a length, got {type(self.dataset).__name__}.")
        self.num_samples = len(self.dataset)
        if not self.num_samples:
            raise ValueError(f"task {task.name!r}: the data set is empty; check its path and split.")

    def run(self, resume: str = "auto", until: int | None = None) -> TrainResult:
        """Train to `config.steps`, then export.

        Args:
            resume: "auto" continues from the newest complete checkpoint in the run folder, if any; "never" starts anew.
            until: write a checkpoint and return after this many finished steps instead.

        Raises:
            ConfigError: if the batch cannot be divided, or the device lacks the precision.
            CheckpointError: if the run cannot be resumed.
            NonFiniteError: if a loss or gradient is not finite.
        """
        choose(resume, ("auto", "never"), "resume mode")
        config, started, last = self.config, time.perf_counter(), min(until or self.config.steps, self.config.steps)
        self.accelerator = self._accelerator()
        try:
            self._prepare()
            step = self._resume(resume)
            losses: dict[str, float] = {}
            log = RunLog(self.accelerator, self.task.name, config, self.resolved, step)
            with log, self.stop_request:
                for line in self.notices:
                    log.say(line)
                for batch in self._batches(step, last):
                    losses, metrics = self._step(step, batch)
                    step += 1
                    self._record(log, step, losses, metrics)
                    if self.stopped_by or step == last or step % config.checkpoint_every == 0:
                        folder = self._save(step)
                    if self.stopped_by:
                        name = signal.Signals(self.stopped_by).name
                        log.say(f"Stopped by {name} after step {step}; wrote {folder}. The same command continues from there.")
                        break
            if step == config.steps and not self.stopped_by:
                self._export()
            return self._result(step, time.perf_counter() - started, losses)
        finally:
            self._release()

    # ---- one step ----

    def _step(self, step: int, batch: Batch) -> tuple[dict[str, float], dict[str, float]]:
        """Run a task's phases on this process's share of a batch; return losses by optimizer and, on logged steps, metrics."""
        config, accelerator = self.config, self.accelerator
        torch.manual_seed(fold_seed(config.seed, "torch", step, accelerator.process_index))
        parts = split(send_to_device(batch, accelerator.device, non_blocking=True), config.accumulation)
        steps = [iter(self.task.step(part, self._context(step, i))) for i, part in enumerate(parts)]
        losses: dict[str, float] = {}
        metrics: dict[str, float] = {}
        while phases := self._backward(steps):
            name = choose(phases[0].optimizer, self.optimizers, f"optimizer of a phase of task {self.task.name!r}:")
            norm = self._gradient_norm(name)
            losses[name], norm_value = self._check_finite(step, name, phases, norm)
            self._update(step, name, norm)
            if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
                rate = self.optimizers[name].param_groups[0]["lr"]
                metrics |= {**self._reduce_logs(phases), f"grad_norm/{name}": norm_value, f"lr/{name}": rate}
        if not losses:
            raise RuntimeError(f"task {self.task.name!r} yielded no phase at step {step}; yield at least one Phase per step.")
        self.ema.update(self.raw, step)
        return losses, metrics

    def _backward(self, steps: Sequence[Iterator[Phase]]) -> list[Phase]:
        """Advance every part of the batch to its next phase and add up the gradients; return the phases, or [] at the end."""
        phases = []
        for i, iterator in enumerate(steps):
            with contextlib.ExitStack() as stack:
                if i + 1 < len(steps):  # processes exchange gradients once per phase
                    for module in self.task.modules.values():
                        stack.enter_context(self.accelerator.no_sync(module))
                with self.accelerator.autocast():
                    phase = next(iterator, None)
                if phase is None:
                    continue
                if phase.loss.ndim != 0 or not phase.loss.requires_grad:
                    got = f"shape {list(phase.loss.shape)}, requires_grad={phase.loss.requires_grad}"
                    raise ValueError(f"{self._at(phase.optimizer)} loss must be a scalar with a gradient, got {got}.")
                self.accelerator.backward(phase.loss / len(steps))
            phases.append(dataclasses.replace(phase, loss=phase.loss.detach()))
        if phases and (len(phases) < len(steps) or len({phase.optimizer for phase in phases}) > 1):
            names = [phase.optimizer for phase in phases]
            raise RuntimeError(f"{self._at(names[0])} all {len(steps)} parts of a batch must yield the same phases, got {names}.")
        return phases

    def _gradient_norm(self, name: str) -> Tensor:
        """Return the norm of an optimizer's gradients, 0-d, freed of the loss scale."""
        self.accelerator.unscale_gradients(self.optimizers[name])
        gradients = [p.grad for group in self.optimizers[name].param_groups for p in group["params"] if p.grad is not None]
        if not gradients:
            raise RuntimeError(f"{self._at(name)} loss reaches no parameter of that optimizer; check detach() and no_grad().")
        return torch.nn.utils.get_total_norm(gradients)

    def _check_finite(self, step: int, name: str, phases: Sequence[Phase], norm: Tensor) -> tuple[float, float]:
        """Return (mean loss over parts and processes, gradient norm), or stop; one exchange also spreads a stop signal."""
        stop = norm.new_tensor(self.stop_request.number)
        local = torch.stack([*(phase.loss.float() for phase in phases), norm.float(), stop.float()])
        table = self.accelerator.gather(local).view(self.accelerator.num_processes, len(phases) + 2).tolist()
        self.stopped_by = int(max(row[-1] for row in table))
        losses = [loss for row in table for loss in row[:-2]]
        norm_value = table[0][-2]
        is_scaled = self.accelerator.scaler is not None  # the scaler skips updates with infinite gradients and lowers its scale
        if not all(map(math.isfinite, losses)) or not (math.isfinite(norm_value) or is_scaled):
            raise NonFiniteError(self._describe_nonfinite(step, name, losses, norm_value))
        return sum(losses) / len(losses), norm_value

    def _describe_nonfinite(self, step: int, name: str, losses: list[float], norm: float) -> str:
        """Say where a run broke: step, samples, optimizer, parameter groups."""
        indices = self.sampler.indices(step).view(len(losses), -1)  # process by process, part by part, as the losses are
        bad = [i for i, loss in enumerate(losses) if not math.isfinite(loss)] or list(range(len(losses)))
        samples = indices[bad].flatten().tolist()
        shown = ", ".join(map(str, samples[:64])) + (f", ... ({len(samples)} in all)" if len(samples) > 64 else "")
        names = {id(p): f"{m}.{key}" for m, module in self.raw.items() for key, p in module.named_parameters()}
        groups = []
        for i, group in enumerate(self.optimizers[name].param_groups):
            gradients = [names[id(p)] for p in group["params"] if p.grad is not None and not torch.isfinite(p.grad).all()]
            weights = [names[id(p)] for p in group["params"] if not torch.isfinite(p).all()]
            kinds = (("gradients", gradients), ("weights", weights))
            found = [f"{len(keys)} non-finite {kind} ({', '.join(keys[:3])})" for kind, keys in kinds if keys]
            groups.append(f"group {group.get('name', i)}: {', '.join(found) or 'finite gradients and weights'}")
        values = ", ".join(f"{losses[i]:g}" for i in bad)
        return (
            f"Training stopped at step {step}: loss of optimizer {name!r} is {values}, gradient norm {norm:g}; {'; '.join(groups)}. "
            f"Samples of the batch: {shown}. This update was not made; the last checkpoint is sound. "
            "Check these samples, lower the learning rate or set train.grad_clip."
        )

    def _update(self, step: int, name: str, norm: Tensor) -> None:
        """Clip, set the learning rate, step one optimizer, and clear every gradient the phase left."""
        optimizer = self.optimizers[name]
        if self.config.grad_clip is not None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.grad_clip, norm)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.config.lr_factor(step)
        optimizer.step()
        for module in self.raw.values():
            module.zero_grad(set_to_none=True)

    def _reduce_logs(self, phases: Sequence[Phase]) -> dict[str, float]:
        """Average a phase's logs over parts and processes."""
        keys = list(phases[0].logs)
        if not keys:
            return {}
        device = self.accelerator.device
        values = [torch.as_tensor(phase.logs[key], dtype=torch.float32, device=device).detach() for phase in phases for key in keys]
        means = self.accelerator.reduce(torch.stack(values).view(len(phases), -1).mean(0), reduction="mean")
        return dict(zip(keys, means.tolist(), strict=True))

    def _context(self, step: int, part: int) -> StepContext:
        a = self.accelerator
        parts = self.config.accumulation
        return StepContext(step, self.config.seed, a.device, self.ema.modules, a.num_processes, a.process_index, part, parts)

    def _at(self, phase: str) -> str:
        return f"task {self.task.name!r}, phase {phase!r}:"

    # ---- around the steps ----

    def _accelerator(self) -> Accelerator:
        """Build the accelerator, which chooses device and processes."""
        config = self.config
        ddp = DistributedDataParallelKwargs(find_unused_parameters=self.task.find_unused_parameters, broadcast_buffers=False)
        self.owns_state = not AcceleratorState._shared_state  # else the caller has an accelerator of its own
        project = ProjectConfiguration(project_dir=config.out, logging_dir=str(self.out / "logs"))
        try:
            trackers = list(config.trackers) or None
            return Accelerator(mixed_precision=config.mixed_precision, log_with=trackers, project_config=project, kwargs_handlers=[ddp])
        except ValueError as error:
            self._forget()
            raise ConfigError(f"train.mixed_precision={config.mixed_precision} does not work on this device: {error}") from error

    def _prepare(self) -> None:
        """Place and wrap modules and optimizers, copy averages."""
        task, config = self.task, self.config
        self.stopped_by, self.notices = 0, []
        world, device = self.accelerator.num_processes, self.accelerator.device
        if self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
            raise ConfigError(f"accelerate: {self.accelerator.distributed_type.value} is not supported; choose multi-GPU (DDP).")
        if config.batch_size % (world * config.accumulation):
            need = f"{world} processes x train.accumulation={config.accumulation}"
            raise ConfigError(f"train.batch_size must be a multiple of {need}, got {config.batch_size}.")
        self.raw = {name: module.to(device).train() for name, module in task.modules.items()}
        for module in task.frozen.values():
            module.to(device).eval().requires_grad_(False)
        averaged = {choose(n, self.raw, "module in Task.ema:"): self.raw[n] for n in task.ema}
        self.ema = EMA(averaged, config.ema_decay, config.ema_warmup, torch.device("cpu") if config.ema_device == "cpu" else None)
        optimizers = task.optimizers()
        check_owned(self.raw, optimizers)
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["initial_lr"] = group["lr"]
        has_weights = {name: any(p.requires_grad for p in module.parameters()) for name, module in self.raw.items()}
        task.modules = {n: self.accelerator.prepare_model(m) if has_weights[n] else m for n, m in self.raw.items()}
        self.optimizers = {name: self.accelerator.prepare_optimizer(optimizer) for name, optimizer in optimizers.items()}

    def _batches(self, first: int, last: int) -> Iterator[Batch]:
        """Load this process's share of the batches of steps first .. last - 1."""
        config, accelerator = self.config, self.accelerator
        rank, world = accelerator.process_index, accelerator.num_processes
        self.sampler = GlobalBatchSampler(self.num_samples, config.batch_size, config.seed, first, last, rank, world)
        return iter(
            DataLoader(
                self.dataset,
                batch_sampler=self.sampler,
                collate_fn=self.task.collate,
                worker_init_fn=ignore_interrupts,
                num_workers=config.num_workers,
                pin_memory=accelerator.device.type == "cuda",
                generator=torch.Generator(),
            )
        )

    def _record(self, log: RunLog, step: int, losses: dict[str, float], metrics: dict[str, float]) -> None:
        """Show and write what is due after `step` finished steps."""
        config = self.config
        log.advance(step, losses)
        if config.evaluate is not None and config.evaluate_every and step % config.evaluate_every == 0:
            with torch.no_grad(), self.ema.on(self.accelerator.device):
                metrics |= evaluation.measure(self.task, self.raw, config.evaluate, self._context(step, 0))
        if metrics:
            names = {name: "loss" if len(losses) == 1 else f"loss/{name}" for name in losses}
            log.write(step, {**{names[name]: value for name, value in losses.items()}, **metrics})
        if config.sample_every and step % config.sample_every == 0 and self.accelerator.is_main_process:
            grids = self._sample(step)
            if grids:
                log.pictures(step, grids)

    @torch.no_grad()
    def _sample(self, step: int) -> dict[str, Tensor]:
        """Let the task draw pictures for the first samples of the first batch, in eval mode."""
        first = self.sampler.indices(0)[:SAMPLE_BATCH].tolist()
        batch = (self.task.collate or default_collate)([self.dataset[i] for i in first])
        device = self.accelerator.device
        for module in self.raw.values():
            module.eval()
        with self.accelerator.autocast(), self.ema.on(device):
            grids = self.task.sample(send_to_device(batch, device), StepContext(step, self.config.seed, device, self.ema.modules))
        for module in self.raw.values():
            module.train()
        return grids

    def _resume(self, mode: str) -> int:
        """Load the newest complete checkpoint, if any, and return its finished steps."""
        found = checkpoint.find(self.out)
        if found and mode == "never":
            raise checkpoint.CheckpointError(f"train.out: {self.out} holds checkpoints of another run; choose another or resume it.")
        step = 0
        if found:
            folder = found[-1]
            saved = checkpoint.load_config(folder)
            wrong = self.config.differences(saved.get("train") or {})
            if wrong:
                remedy = "Use the values there or choose another train.out."
                raise checkpoint.CheckpointError(f"cannot resume from {folder}: {'; '.join(wrong)}. {remedy}")
            changed = differences("task_config", saved.get("task_config") or {}, self.resolved.get("task_config") or {})
            state = checkpoint.load(folder, self.raw, self.ema.modules)
            step = int(state["step"])
            if step > self.config.steps:
                raise checkpoint.CheckpointError(f"cannot resume from {folder}: it is past train.steps={self.config.steps}; raise that.")
            checkpoint.load_optimizers(folder, state["optimizers"], self.optimizers)
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            self.notices = [f"Resuming after step {step} of {self.config.steps}.", *(f"Note: {c}; from now on as here." for c in changed)]
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            checkpoint.remove_stale(self.out)
            checkpoint.write_text(self.out / "config.yaml", yaml.safe_dump(self.resolved, sort_keys=False))
        self.accelerator.wait_for_everyone()
        return step

    def _save(self, step: int) -> Path:
        """Write a checkpoint in the main process while the others wait."""
        folder = checkpoint.folder_of(self.out, step)
        if self.accelerator.is_main_process:
            state: dict[str, Any] = {"optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}}
            if self.accelerator.scaler is not None:
                state["scaler"] = self.accelerator.scaler.state_dict()
            checkpoint.save(self.out, step, self.raw, self.ema.modules, state, self.resolved, self.config.keep_checkpoints)
        self.accelerator.wait_for_everyone()
        return folder

    def _export(self) -> None:
        """Let the task write its deployable folder out/export, whole or not at all."""
        if self.accelerator.is_main_process:
            modules = {name: module.eval() for name, module in {**self.raw, **self.ema.modules}.items()}
            checkpoint.write_folder(self.out / "export", lambda folder: self.task.export(modules, folder))
        self.accelerator.wait_for_everyone()

    def _result(self, step: int, seconds: float, losses: dict[str, float]) -> TrainResult:
        world, stopped_by = self.accelerator.num_processes, self.stopped_by or None
        result = TrainResult(step, self.config.steps, world, seconds, losses, str(self.out), stopped_by)
        if self.accelerator.is_main_process:
            checkpoint.write_text(self.out / "result.json", json.dumps(dataclasses.asdict(result), indent=1))
        return result

    def _release(self) -> None:
        """Unwrap the modules and forget accelerate's global state, so that another run may choose another precision."""
        self.task.modules = {name: self.accelerator.unwrap_model(m, keep_fp32_wrapper=False) for name, m in self.task.modules.items()}
        for module in self.task.modules.values():
            module.__dict__.pop("_is_accelerate_prepared", None)
        if self.owns_state:
            self.accelerator.state.destroy_process_group()
        self._forget()

    def _forget(self) -> None:
        if self.owns_state:
            AcceleratorState._reset_state(reset_partial_state=True)
