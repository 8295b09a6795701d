"""What the loop asks of a task: modules, optimizers, data, and one step written like the paper's algorithm box.

A step is a generator. Each `yield Phase(...)` hands one loss to the loop, which runs backward, clipping and the optimizer's update
before the generator goes on, so adversarial and fake-score objectives read top to bottom. With accumulation the parts of a batch
go through each phase together: the second phase of every part sees weights that the first phase has updated once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

from genkit.training.sampler import fold_seed

if TYPE_CHECKING:
    from genkit.training.evaluation import EvaluationConfig

Batch = Any


@dataclass
class Phase:
    """One loss to descend.

    Args:
        optimizer: name of the optimizer to step.
        loss: scalar, the mean over the samples handed to the step.
        logs: name -> scalar to record; every process gives the same names.
    """

    optimizer: str
    loss: Tensor
    logs: Mapping[str, Tensor | float] = field(default_factory=dict)


@dataclass
class StepContext:
    """What a step may know besides its batch, and where all its randomness comes from.

    Args:
        step: finished steps.
        seed: of the run.
        device: where the modules are.
        ema: name -> averaged module, in eval mode and without gradients.
        num_processes: training processes.
        process_index: index of this one.
        part: index of this part of the process's share, below num_parts.
        num_parts: parts under gradient accumulation.
    """

    step: int
    seed: int
    device: torch.device
    ema: Mapping[str, nn.Module] = field(default_factory=dict)
    num_processes: int = 1
    process_index: int = 0
    part: int = 0
    num_parts: int = 1

    def generator(self, name: str) -> torch.Generator:
        """Return a CPU generator seeded from (seed, step, name): the same in every process and part of the batch."""
        return torch.Generator().manual_seed(fold_seed(self.seed, self.step, name))

    def rand(self, name: str, local_batch: int, *shape: int) -> Tensor:
        """Draw uniforms in [0, 1) that belong to samples, whatever the number of processes and parts.

        Args:
            name: of the stream; one name gives one draw per step.
            local_batch: rows of the batch handed to this step.
            *shape: of each row.

        Returns:
            This part's rows [local_batch, *shape] of one draw over the whole batch, float32 on the device.
        """
        return self._own(torch.rand, name, local_batch, shape)

    def randn(self, name: str, local_batch: int, *shape: int) -> Tensor:
        """Draw standard normal numbers that belong to samples; see `rand`."""
        return self._own(torch.randn, name, local_batch, shape)

    def _own(self, draw: Callable[..., Tensor], name: str, local_batch: int, shape: Sequence[int]) -> Tensor:
        """Return this part's rows of one draw over the whole batch."""
        rows = local_batch * self.num_processes * self.num_parts
        first = (self.process_index * self.num_parts + self.part) * local_batch
        drawn = draw(rows, *shape, generator=self.generator(name), dtype=torch.float32)
        return drawn[first : first + local_batch].to(self.device)

    def draw(self, name: str) -> float:
        """Draw one uniform in [0, 1) shared by the whole batch."""
        return float(torch.rand((), generator=self.generator(name)))


class Task(ABC):
    """Modules, losses and optimizers of one objective.

    A subclass sets the attributes in `__init__` and takes randomness from the context (or, for dropout, from torch's default
    generator, which the loop seeds anew each step). Buffers that a module changes while training are not synchronised between
    processes: reduce them in the task.

    Attributes:
        name: of the task.
        modules: trained and saved. In `step`, call `self.modules[x](...)` for anything whose gradients are used (with several
            processes these are wrapped), and `self.raw(x)` for methods other than forward or where only gradients of inputs are
            wanted, as a generator's loss does with its discriminator.
        frozen: moved to the device, kept in eval mode, never saved.
        ema: names of the modules that get a running average.
        find_unused_parameters: True if a step leaves trained parameters without gradient.
        collate: joins samples to a batch; None for torch's default.
    """

    name: str
    modules: dict[str, nn.Module]
    frozen: Mapping[str, nn.Module] = MappingProxyType({})
    ema: tuple[str, ...] = ()
    find_unused_parameters: bool = False
    collate: Callable[[Sequence[Any]], Batch] | None = None

    @abstractmethod
    def dataset(self) -> Dataset[Any]:
        """Return the training samples: a map-style data set of dicts of tensors."""

    @abstractmethod
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the optimizers by name; called once, after the modules are on the device."""

    @abstractmethod
    def step(self, batch: Batch, ctx: StepContext) -> Iterator[Phase]:
        """Yield the phases of one training step on this process's share of a batch, never from inside `torch.no_grad()`."""

    @abstractmethod
    def export(self, modules: dict[str, nn.Module], out: Path) -> None:
        """Write what the training is for (`save_pretrained`) into the folder `out`; `modules` holds averages where there are any."""

    def sample(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """Return pictures to look at, name -> [n, 3, h, w] in [-1, 1]; the batch is the same small one each time."""
        return {}

    def generate(self, indices: Sequence[int], ctx: StepContext) -> Tensor:
        """Return what the averaged weights make, to be judged: picture i of an endless, fixed series for each index.

        Returns:
            [len(indices), 3, h, w] in [-1, 1].

        Raises:
            NotImplementedError: if the task makes no pictures.
        """
        raise NotImplementedError(f"task {self.name!r} makes no pictures to evaluate; leave out train.evaluate_every.")

    def check_evaluation(self, config: EvaluationConfig) -> None:
        """Refuse what `evaluate` cannot measure, before the training starts.

        Raises:
            ValueError: naming the nearest metric.
        """
        from genkit.training.evaluation import check_pictures

        check_pictures(config)

    def evaluate(self, config: EvaluationConfig, ctx: StepContext) -> dict[str, float]:
        """Return metrics of what the averaged weights make, by name; here those of the pictures of `generate`."""
        from genkit.training.evaluation import picture_metrics

        return picture_metrics(self, config, ctx)

    def raw(self, name: str) -> nn.Module:
        """Return a trained module without the wrapper of distributed training."""
        module = self.modules[name]
        return module.module if isinstance(module, DistributedDataParallel) else module


def check_owned(modules: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer]) -> None:
    """Refuse parameters that no optimizer would ever change, and those that no checkpoint would hold."""
    owned = {id(p) for optimizer in optimizers.values() for group in optimizer.param_groups for p in group["params"]}
    named = [(f"{name}.{key}", p) for name, module in modules.items() for key, p in module.named_parameters()]
    lost = [key for key, p in named if p.requires_grad and id(p) not in owned]
    if lost:
        shown = ", ".join(lost[:10])
        raise ValueError(f"Task.optimizers: {len(lost)} trainable parameters are in no optimizer: {shown}; add them or freeze them.")
    strange = owned - {id(p) for _, p in named}
    if strange:
        where = ", ".join(modules)
        raise ValueError(f"Task.optimizers: {len(strange)} optimized tensors are in none of Task.modules ({where}); add their modules.")


def split(batch: Batch, parts: int) -> list[Batch]:
    """Cut a batch, a dict of tensors and lists with one row per sample, into equal contiguous parts."""
    if parts == 1:
        return [batch]
    if not isinstance(batch, dict):
        raise TypeError(f"train.accumulation: batches must be dicts of tensors and lists to be cut, got {type(batch).__name__}.")
    rows = {key: len(value) // parts for key, value in batch.items()}
    return [{key: value[rows[key] * i : rows[key] * (i + 1)] for key, value in batch.items()} for i in range(parts)]
