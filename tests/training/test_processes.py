"""Runs as users have them: killed at any moment, and in two processes."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from genkit.training import checkpoint
from genkit.training.config import TrainConfig
from genkit.training.loop import Trainer
from tests.training.test_loop import assert_same_run, records
from tests.training.toy import Regression, Rivals

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("toy.py")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def start(launcher: list[str], task: str, config: dict[str, Any], arguments: dict[str, Any], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        command = [*launcher, str(SCRIPT), task, json.dumps(config), json.dumps(arguments)]
        return subprocess.Popen(command, env=ENVIRONMENT, stdout=file, stderr=subprocess.STDOUT)


def test_killed_run_resumes_to_the_uninterrupted_result_bit_for_bit(tmp_path: Path) -> None:
    steps = 150
    config: dict[str, Any] = {"steps": steps, "batch_size": 8, "schedule": "cosine", "warmup": 10, "log_every": 10}
    killed, seen = tmp_path / "killed", random.randint(2, 40)
    often = {**config, "out": str(killed), "checkpoint_every": 1}
    process = start([sys.executable], "regression", often, {"dropout": 0.2, "pause": 0.01}, tmp_path / "log")
    deadline = time.monotonic() + 60
    reached = checkpoint.folder_of(killed, seen).name
    while not any(path.name >= reached for path in killed.glob("checkpoints/step-*")):
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline, f"no checkpoint {seen} within a minute"
        time.sleep(0.002)
    time.sleep(random.random() * 0.05)  # often in the middle of writing a later one
    process.kill()
    process.wait()
    assert not checkpoint.folder_of(killed, steps).exists()
    Trainer(Regression(dropout=0.2), TrainConfig(out=str(killed), **config)).run()
    Trainer(Regression(dropout=0.2), TrainConfig(out=str(tmp_path / "whole"), **config)).run()
    assert_same_run(tmp_path / "whole", killed, steps)


def test_two_processes_give_the_single_process_result(tmp_path: Path) -> None:
    config: dict[str, Any] = {"steps": 8, "batch_size": 12, "warmup": 2, "log_every": 4, "grad_clip": 0.5}
    two, one = tmp_path / "two", tmp_path / "one"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = start(launcher, "rivals", {**config, "out": str(two), "accumulation": 2}, {}, tmp_path / "log")
    Trainer(Rivals(), TrainConfig(out=str(one), **config)).run()
    process.wait(timeout=120)
    log = (tmp_path / "log").read_text()
    assert (two / "result.json").exists(), log
    result = json.loads((two / "result.json").read_text())
    assert (result["num_processes"], result["step"]) == (2, 8), log
    for path in sorted(checkpoint.folder_of(one, 8).glob("*.safetensors")):
        torch.testing.assert_close(load_file(checkpoint.folder_of(two, 8) / path.name), load_file(path), rtol=0, atol=1e-6)
    for mine, theirs in zip(records(two), records(one), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
