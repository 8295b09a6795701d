"""What the benchmarks share: the machine, timed runs of several ways in turn, the report."""

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor


def machine(device: str) -> str:
    """Describe what runs."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        name = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")), name)
    if device.startswith("cuda"):
        name = f"{torch.cuda.get_device_name(device)} (host {name})"
    return f"{name}, {os.cpu_count()} cores; torch {torch.__version__}, {torch.get_num_threads()} threads"


@dataclass
class Timing:
    """Runs of one way: seconds by the clock, seconds of CPU time (less disturbed by other programs), and what came out."""

    clock: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    result: Tensor | None = None


def timed(ways: dict[str, Callable[[], Tensor]], repeats: int, device: str) -> dict[str, Timing]:
    """Run every way in turn, once to warm up and then `repeats` times, so that a busy moment hits all of them."""
    timings = {name: Timing() for name in ways}
    for round_number in range(repeats + 1):
        for name, run in ways.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            timings[name].result = run()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if round_number:
                timings[name].clock.append(time.perf_counter() - start)
                timings[name].cpu.append(time.process_time() - cpu_start)
    return timings


def report(timings: dict[str, Timing], count: int, what: str) -> None:
    """Print median, spread, `count` of `what` per second, and speed-up of each way over the first."""
    first = next(iter(timings.values()))
    for name, timing in timings.items():
        clock, cpu = statistics.median(timing.clock), statistics.median(timing.cpu)
        speed = f"{1e3 * clock:9.1f} ms ({1e3 * min(timing.clock):.1f} .. {1e3 * max(timing.clock):.1f}), {count / clock:.2f} {what}/s"
        ratios = f"{statistics.median(first.clock) / clock:.2f}x by the clock, {statistics.median(first.cpu) / cpu:.2f}x in CPU time"
        result, other = cast(Tensor, timing.result), cast(Tensor, first.result)
        if result.is_floating_point():
            agreement = f"largest difference {(result.double() - other.double()).abs().max().item():.1g}"
        else:
            agreement = f"{100 * (result == other).float().mean().item():.2f} % equal results"
        print(f"{name:21} {speed}; {ratios}; {agreement}")


def growth(run: Callable[[], object]) -> float:
    """Return the MB by which this process grows at most during a run (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak counts from now on
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def in_own_process(module: str, call: str) -> float:
    """Return the number that a function of a benchmark gives in a fresh process, where no memory is held from before."""
    code = f"import {module}; print({module}.{call})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=sys.path[0])
    return float(found.stdout)


def _resident(name: str) -> float:
    """Return a line of the process's status in MB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1e3
