"""Distil in the processes this script is started in: `argv` is a data folder, a method and a TrainConfig (JSON)."""

from __future__ import annotations

import json
import os
import sys

import torch

from genkit.tasks.distill import Config, DistillTask
from genkit.training.config import TrainConfig
from genkit.training.loop import Trainer
from tests.distill.toy import teacher


def main() -> None:
    """Train, then leave without gloo's exit."""
    torch.set_num_threads(1)
    data, method, config = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    settings = Config(teacher="toy", method=method, data=data, image_size=8, lr=1e-3, betas=(0.9, 0.999), eps=1e-3)
    result = Trainer(DistillTask(settings, teacher()), TrainConfig(**config)).run()
    if result.num_processes > 1 and int(os.environ.get("RANK", "0")) == 0:
        print("processes", result.num_processes)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
