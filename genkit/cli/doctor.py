"""`genkit doctor`: what this machine has, what genkit needs, and what is broken with the way to mend it."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from genkit.cli._output import add_json, bytes_text, print_json, print_table

HELP = "check this machine: versions, processor, accelerators, disk, and known breakages with their remedy"

DISTRIBUTION = "genkit-torch"
# Imported in a process of its own, in this order: the packages whose failure stops everything.
IMPORTS = ("torch", "torchvision", "transformers", "diffusers")
OPTIONAL = {"torchvision"}
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16")


@dataclass(frozen=True)
class Check:
    """One finding: `state` is "ok", "note" (works, but worth knowing) or "broken" (with the remedy)."""

    name: str
    state: str
    detail: str
    remedy: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the findings; 1 if something is broken."""
    checks = [*check_system(), *check_versions(), *check_imports(), *check_accelerators(), *check_disk()]
    broken = [check for check in checks if check.state == "broken"]
    if args.json:
        print_json({"ok": not broken, "checks": [asdict(check) for check in checks]})
        return 1 if broken else 0
    print_table(("", "what", "found"), [(check.state, check.name, check.detail) for check in checks])
    for check in broken:
        print(f"\nbroken: {check.name}: {check.detail}\n  to mend it: {check.remedy}")
    print("\nSomething is broken: see above." if broken else "\nNothing is broken.")
    return 1 if broken else 0


def check_system() -> list[Check]:
    """Return Python, operating system, processor and threads."""
    flags = cpu_flags()
    wanted = ", ".join(flag for flag in CPU_FLAGS if flag in flags) or "flags unknown here"
    threads = os.environ.get("OMP_NUM_THREADS")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limit = f", OMP_NUM_THREADS={threads}" if threads else ""
    return [
        Check("python", "ok", f"{platform.python_version()} at {sys.executable}"),
        Check("system", "ok", f"{platform.system()} {platform.release()} {platform.machine()}"),
        Check("processor", "ok", wanted),
        Check("threads", "ok", f"{usable} of {os.cpu_count()} processors usable{limit}"),
    ]


def cpu_flags() -> set[str]:
    """Return the processor's feature flags, where Linux tells them."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return set()
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", path.read_text(), re.MULTILINE)
    return set(match.group(1).split()) if match else set()


def requirements() -> list[str]:
    """Return the requirement lines of this distribution; empty if genkit runs without being installed."""
    try:
        return metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return []


def check_versions() -> list[Check]:
    """Compare the installed version of each dependency with the range that genkit declares."""
    from packaging.requirements import Requirement

    lines = requirements()
    if not lines:
        return [Check(DISTRIBUTION, "note", "runs from a folder without being installed: versions not compared")]
    checks = [Check(DISTRIBUTION, "ok", metadata.version(DISTRIBUTION))]
    for requirement in map(Requirement, lines):
        extra = re.search(r"extra == ['\"](\w+)['\"]", str(requirement.marker or ""))
        if extra and extra.group(1) == "test":
            continue
        checks.append(check_version(requirement.name, requirement.specifier, extra.group(1) if extra else None))
    return checks


def check_version(name: str, allowed: Any, extra: str | None) -> Check:
    """Check one dependency against the versions allowed; one that only an extra needs may be absent."""
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        if extra:
            return Check(name, "note", f"not installed (extra {extra!r})")
        return Check(name, "broken", "not installed", f"pip install '{name}{allowed}'")
    if not allowed.contains(found, prereleases=True):
        return Check(name, "broken", f"{found}, genkit needs {allowed}", f"pip install '{name}{allowed}'")
    return Check(name, "ok", found)


def check_imports() -> list[Check]:
    """Import the large packages in a process of their own, so that a crash there is a finding and not our end."""
    checks = []
    for name in IMPORTS:
        if importlib.util.find_spec(name) is None:
            if name not in OPTIONAL:
                checks.append(Check(f"import {name}", "broken", "not installed", f"pip install {name}"))
            continue
        done = subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            checks.append(Check(f"import {name}", "ok", "works"))
            continue
        lines = done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"]
        checks.append(Check(f"import {name}", "broken", lines[-1], remedy_for(name)))
        if name in ("torch", "torchvision"):
            break  # the others fail for the same reason
    return checks


def remedy_for(name: str) -> str:
    """Return what to do about a package that does not import."""
    if name == "torchvision":
        return (
            "torchvision does not fit the installed torch, and transformers and diffusers import it whenever it is there. genkit does not "
            "need it: `pip uninstall torchvision`. If something else does, install the torchvision that was built for this torch, from the "
            "same package index"
        )
    return f"pip install --force-reinstall {name}, with the versions of constraints.txt"


def check_accelerators() -> list[Check]:
    """Return the devices torch can use, and which of them compute in bfloat16."""
    if importlib.util.find_spec("torch") is None:
        return []
    try:
        import torch
    except (ImportError, OSError, RuntimeError):
        return []  # check_imports has said it
    cuda = torch.version.cuda or "not in this build"
    build = f"CPU code {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, CUDA {cuda}"
    checks = [Check("torch build", "ok", build)]
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        detail = f"{found.name}, {bytes_text(found.total_memory)}, capability {found.major}.{found.minor}, {bf16}"
        checks.append(Check(f"cuda:{index}", "ok", detail))
    if torch.backends.mps.is_available():
        checks.append(Check("mps", "ok", "Apple GPU"))
    if len(checks) == 1:
        checks.append(Check("accelerator", "note", "none: everything runs on the CPU"))
        if shutil.which("nvidia-smi") and torch.version.cuda is None:
            checks.append(Check("cuda", "note", "nvidia-smi is here, but torch is a CPU build: see 'CPU or GPU' in README"))
    return checks


def check_disk() -> list[Check]:
    """Return the free space at the working folder and at the Hugging Face cache."""
    cache = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    checks = []
    for name, path in (("this folder", Path.cwd()), ("model cache", cache)):
        there = next(folder for folder in (path, *path.parents) if folder.exists())
        free = shutil.disk_usage(there).free
        state = "note" if free < 2e9 else "ok"
        checks.append(Check(f"disk: {name}", state, f"{bytes_text(free)} free at {path}"))
    return checks
