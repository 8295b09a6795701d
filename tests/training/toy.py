"""Small tasks that the training tests share; run as a script, trains one of them."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from genkit.training.config import TrainConfig
from genkit.training.loop import Trainer
from genkit.training.task import Batch, Phase, StepContext, Task


class Points(Dataset[dict[str, object]]):
    """37 points of a fixed plane."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(37, 3, generator=generator)
        self.y = self.x @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.3

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, object]:
        return {"x": self.x[i], "y": self.y[i], "name": f"point {i}"}


class Regression(Task):
    """Fit a plane with noise on the inputs: one module, one optimizer, one average."""

    name = "regression"
    ema = ("net",)

    def __init__(self, dropout: float = 0.0, pause: float = 0.0, lr: float = 0.02) -> None:
        generator = torch.Generator().manual_seed(1)
        self.modules = {"net": nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Dropout(dropout), nn.Linear(8, 1))}
        for p in self.modules["net"].parameters():
            p.data = torch.randn(p.shape, generator=generator) * 0.3
        self.frozen = {"scale": nn.Linear(3, 3)}
        self.pause, self.lr = pause, lr

    def dataset(self) -> Points:
        return Points()

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"main": torch.optim.AdamW(self.modules["net"].parameters(), lr=self.lr)}

    def step(self, batch: Batch, ctx: StepContext) -> Iterator[Phase]:
        time.sleep(self.pause)
        x, y = batch["x"], batch["y"]
        noise = ctx.rand("noise", len(x), 3) - 0.5
        loss = (self.modules["net"](x + (0.1 + ctx.draw("level")) * noise) - y).square().mean()
        yield Phase("main", loss, {"noise": noise.mean()})

    def sample(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        assert not self.modules["net"].training
        return {"planes": self.modules["net"](batch["x"]).tanh().view(-1, 1, 1, 1).expand(-1, 3, 5, 4)}

    def export(self, modules: dict[str, nn.Module], out: Path) -> None:
        save_file(modules["net"].state_dict(), out / "net.safetensors")


class Rivals(Regression):
    """Two modules with an optimizer each; the second phase depends on the first one's update."""

    name = "rivals"

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.modules["critic"] = nn.Linear(1, 1)
        for p in self.modules["critic"].parameters():
            p.data = torch.randn(p.shape, generator=generator)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        critic = torch.optim.SGD(self.modules["critic"].parameters(), lr=0.05, momentum=0.9)
        return {**super().optimizers(), "critic": critic}

    def step(self, batch: Batch, ctx: StepContext) -> Iterator[Phase]:
        y = batch["y"]
        x = batch["x"] + 0.1 * ctx.rand("noise", len(y), 3)
        guess = self.modules["net"](x)
        yield Phase("main", (guess - y).square().mean() + 0.1 * self.raw("critic")(guess).square().mean())
        with torch.no_grad():
            better = self.modules["net"](x)
        yield Phase("critic", (self.modules["critic"](better) - y).square().mean(), {"gap": (better - guess.detach()).square().mean()})


class Breaking(Regression):
    """Has an infinite loss for sample 5 from a given step on, and remembers the weights each step began with."""

    name = "breaking"

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.seen = at, [torch.empty(0)]

    def step(self, batch: Batch, ctx: StepContext) -> Iterator[Phase]:
        self.seen.append(nn.utils.parameters_to_vector(self.modules["net"].parameters()).detach().clone())
        for phase in super().step(batch, ctx):
            is_bad = ctx.step >= self.at and "point 5" in batch["name"]
            yield Phase(phase.optimizer, phase.loss * float("inf") if is_bad else phase.loss)


TASKS = {"regression": Regression, "rivals": Rivals}


def main() -> None:
    """Train `argv[1]` with the TrainConfig in `argv[2]` and the task's arguments in `argv[3]` (JSON), then leave without gloo's exit."""
    torch.set_num_threads(1)
    name, config, arguments = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    Trainer(TASKS[name](**arguments), TrainConfig(**config)).run()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
