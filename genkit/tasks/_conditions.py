"""Rows of conditions for training samples: one per prompt, looked up by the sample's number.

Letters: v samples, k prompts per sample, u distinct prompts, b batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from genkit.training.task import StepContext


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
