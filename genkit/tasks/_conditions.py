"""Rows of conditions for training samples: one per prompt, looked up by the sample's number.

Letters: v samples, k prompts per sample, u distinct prompts, b batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from genkit.data.files import atomic_write
from genkit.training.task import StepContext
from genkit.weights import read_safetensors


class ConditionTable:
    """Conditions of the distinct prompts of a data set, in memory.

    Args:
        prompts: k prompts for each of v samples; none for an unconditional model.
        encode: distinct prompts -> conditions, name -> rows [u, ...].
        batch_size: prompts per call of `encode`.
    """

    def __init__(
        self, prompts: Sequence[Sequence[str | int]], encode: Callable[[list[str | int]], Mapping[str, Tensor]], batch_size: int = 256
    ) -> None:
        listed = list(dict.fromkeys(prompt for row in prompts for prompt in row))
        place = {prompt: i for i, prompt in enumerate(listed)}
        self.index = [torch.tensor([place[prompt] for prompt in row]) for row in prompts]
        parts = [encode(listed[start : start + batch_size]) for start in range(0, len(listed), batch_size)]
        self.rows = {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]} if parts else {}

    @classmethod
    def of_rows(cls, rows: Mapping[str, Tensor]) -> ConditionTable:
        """Return the table of conditions computed before, one per sample."""
        table = cls([], lambda prompts: {})
        table.rows = dict(rows)
        table.index = list(torch.arange(len(next(iter(rows.values())))).view(-1, 1))
        return table

    def pick(self, index: Tensor, ctx: StepContext, name: str = "prompt") -> dict[str, Tensor]:
        """Return one prompt's condition per sample, on the device.

        Args:
            index: [b] int64, samples.
            ctx: of the step.
            name: of the draw.
        """
        if not self.rows:
            return {}
        draws = ctx.rand(name, len(index)).cpu()
        choice = [int(self.index[i][int(u * len(self.index[i]))]) for i, u in zip(index.tolist(), draws.tolist(), strict=True)]
        return {name: rows[choice].to(ctx.device) for name, rows in self.rows.items()}


EMPTY = "null_"  # prefix of the condition without a prompt in a file of conditions


def write_conditions(path: str | Path, conditions: Mapping[str, Tensor], empty: Mapping[str, Tensor]) -> None:
    """Write conditions [v, ...] and the empty one [1, ...] as safetensors, floats in half precision; whole or not at all.

    Raises:
        ValueError: if the name does not end in .safetensors.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"conditions are written as safetensors, got the name {path.name!r}.")
    named = {**conditions, **{f"{EMPTY}{name}": rows for name, rows in empty.items()}}
    with atomic_write(path) as file:
        file.write(save({name: (rows.half() if rows.is_floating_point() else rows).contiguous().cpu() for name, rows in named.items()}))


def read_conditions(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return conditions [v, ...] and the empty one [1, ...] of a file that `write_conditions` wrote, floats in fp32.

    Raises:
        ValueError: if the file holds something else.
    """
    state = {name: rows.float() if rows.is_floating_point() else rows for name, rows in read_safetensors(path).items()}
    found = {name: rows for name, rows in state.items() if not name.startswith(EMPTY)}
    empty = {name.removeprefix(EMPTY): rows for name, rows in state.items() if name.startswith(EMPTY)}
    if not found or found.keys() != empty.keys() or len({len(rows) for rows in found.values()}) != 1:
        raise ValueError(
            f"{str(path)!r} holds no conditions: expected tensors [v, ...] and one {EMPTY}... [1, ...] for each, got {list(state)}."
        )
    return found, empty
