"""Golden cases: find them, run them, compare, report.

A case is a folder `<system>/<case>/` with config.json (its `kind`, `system/x`, names function `x` of `genkit/parity/<system>.py`),
inputs.safetensors, and where stored weights.safetensors, outputs.safetensors and tolerance.json. A runner gets a `Case` and returns
tensors under the names of outputs.safetensors, which it never sees.
"""

from __future__ import annotations

import importlib
import json
import logging
import pkgutil
import re
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import genkit.parity
from genkit.parity.compare import TensorCheck, compare
from genkit.weights import read_safetensors, safetensors_header

logger = logging.getLogger(__name__)
M = TypeVar("M", bound=nn.Module)
Runner = Callable[["Case"], dict[str, Tensor]]
WeightRule = Callable[[str, Tensor], Tensor]


def formula_tensor(key: str, shape: Sequence[int]) -> Tensor:
    """Return the standard normal numbers that a key stands for in cases without stored weights.

    Args:
        key: hashed with CRC-32 to seed PCG64.
        shape: of the tensor.

    Returns:
        fp32 tensor.
    """
    draws = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()))).standard_normal(tuple(shape), dtype=np.float32)
    return torch.from_numpy(draws)


@dataclass
class Case:
    """One golden case.

    Args:
        dir: its folder.
        device: where to compute.
        dtype: floating type to compute in.
    """

    dir: Path
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32

    @cached_property
    def config(self) -> dict[str, Any]:
        """Constructor arguments and run settings."""
        content: dict[str, Any] = json.loads((self.dir / "config.json").read_text(encoding="utf-8"))
        return content

    @property
    def kind(self) -> str:
        """Name of the runner, `system/x`."""
        return str(self.config["kind"])

    @property
    def name(self) -> str:
        """Folder of the system and of the case."""
        return f"{self.dir.parent.name}/{self.dir.name}"

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        """Inputs and random draws, on the device, floats in the case's dtype."""
        path = self.dir / "inputs.safetensors"
        return {key: self.place(value) for key, value in read_safetensors(path).items()} if path.is_file() else {}

    @cached_property
    def output_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the stored outputs, never their values; none where the case has no outputs."""
        path = self.dir / "outputs.safetensors"
        return safetensors_header(path) if path.is_file() else {}

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the stored outputs."""
        return tuple(self.output_shapes)

    def variants(self, pattern: str, default: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
        """Return the parameters that stand in the names of outputs: the groups of a pattern, once each.

        Args:
            pattern: regular expression with groups.
            default: what to compute for a case without stored outputs.
        """
        found = {match.groups() for name in self.output_names if (match := re.search(pattern, name))}
        return sorted(found) if self.output_names else list(default)

    def weights(self, shapes: Mapping[str, Sequence[int]] | None = None, rule: WeightRule | None = None) -> dict[str, Tensor]:
        """Return the official state dict of the case, fp32 on the CPU.

        Args:
            shapes: official key -> shape, for cases whose weights are a formula.
            rule: (key, standard normal numbers) -> weight, the formula of notes.md.

        Raises:
            FileNotFoundError: if no weights are stored and no formula is given.
        """
        path = self.dir / "weights.safetensors"
        if path.is_file():
            return read_safetensors(path)
        if shapes is None or rule is None:
            raise FileNotFoundError(f"{self.name} has no weights.safetensors, and its runner knows no formula for kind {self.kind!r}.")
        return {key: rule(key, formula_tensor(key, shape)) for key, shape in sorted(shapes.items())}

    def place(self, tensor: Tensor) -> Tensor:
        """Return a tensor on the case's device, a floating one in its dtype."""
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)

    def place_model(self, model: M) -> M:
        """Return a model on the case's device, in its dtype; one in fp32 is not cast, since models keep some parts in fp32."""
        placed = model.to(self.device)
        return placed if self.dtype == torch.float32 else placed.to(self.dtype)


def keep(results: dict[str, Tensor], name: str) -> Callable[[nn.Module, Any, Tensor], None]:
    """Return a hook that stores a module's output under a name."""

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        results[name] = output.detach()

    return hook


def with_gradients(model: Any) -> Any:
    """Return a model whose weights are another's gradients, zero where there are none: converters then name gradients too."""
    shadow = type(model)(**{key: value for key, value in model.config.items() if not key.startswith("_")})
    with torch.no_grad():
        for mine, theirs in zip(shadow.parameters(), model.parameters(), strict=True):
            mine.copy_(torch.zeros_like(mine) if theirs.grad is None else theirs.grad)
    return shadow


@dataclass
class CaseResult:
    """What became of a case: `ok`, `failed`, `skipped` (no runner), or `computed` (nothing to compare with)."""

    name: str
    kind: str
    status: str
    reason: str = ""
    seconds: float = 0.0
    tensors: list[TensorCheck] = field(default_factory=list)

    def __str__(self) -> str:
        head = f"{self.status:8} {self.name} ({self.kind}, {self.seconds:.1f} s){': ' + self.reason if self.reason else ''}"
        return "\n".join([head, *(f"  {check}" for check in self.tensors)])


def discover(root: str | Path) -> list[Path]:
    """Return the folders of all cases below a folder, or the folder itself if it is a case.

    Raises:
        FileNotFoundError: if the folder does not exist or holds no case.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"case folder {str(root)!r} does not exist; give a folder that holds <system>/<case>/config.json.")
    cases = sorted(path.parent for path in root.rglob("config.json") if _is_case(path))
    if not cases:
        raise FileNotFoundError(f"no case below {str(root)!r}; a case is a folder whose config.json has a 'kind' such as 'enat/forward'.")
    return cases


def _is_case(path: Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(content, dict) and "/" in str(content.get("kind", ""))


def find_runner(kind: str) -> Runner | str:
    """Return the runner of a kind, or the reason why there is none."""
    system, _, name = kind.partition("/")
    built = {item for _, item, _ in pkgutil.iter_modules(genkit.parity.__path__)} - {"base", "compare", "certificate"}
    if system not in built:
        return f"no runner: genkit has no system {system!r} yet"
    runner: Runner | None = getattr(importlib.import_module(f"genkit.parity.{system}"), name, None)
    return runner if runner is not None else f"no runner: {system!r} has none for {name!r} yet"


def run(case: Case) -> dict[str, Tensor]:
    """Compute the tensors of a case.

    Raises:
        LookupError: if its kind has no runner.
    """
    runner = find_runner(case.kind)
    if isinstance(runner, str):
        raise LookupError(f"{case.name}: {runner}.")
    return {key: value.detach().cpu().contiguous() for key, value in runner(case).items()}


def check_case(case: Case, save: Path | None = None) -> CaseResult:
    """Run a case and compare it with its stored outputs, if it has any.

    Args:
        case: the case.
        save: folder for the computed tensors, `<system>/<case>.safetensors`.

    Returns:
        The result; an error in the runner is a failed case, so that the others still run.
    """
    runner = find_runner(case.kind)
    if isinstance(runner, str):
        return CaseResult(case.name, case.kind, "skipped", runner)
    start = time.perf_counter()
    try:
        results = run(case)
    except (ValueError, TypeError, LookupError, RuntimeError, AttributeError, OSError, NotImplementedError) as error:
        logger.debug("runner of %s failed", case.kind, exc_info=True)
        return CaseResult(case.name, case.kind, "failed", f"{type(error).__name__}: {error}", time.perf_counter() - start)
    seconds = time.perf_counter() - start
    if save is not None:
        path = save / f"{case.name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(results, path)
    outputs = case.dir / "outputs.safetensors"
    if not outputs.is_file():
        return CaseResult(case.name, case.kind, "computed", "no outputs.safetensors to compare with", seconds)
    tolerance = json.loads((case.dir / "tolerance.json").read_text(encoding="utf-8"))
    checks = compare(results, read_safetensors(outputs), tolerance)
    status = "ok" if all(check.ok for check in checks) else "failed"
    return CaseResult(case.name, case.kind, status, "", seconds, checks)


def run_cases(
    roots: Sequence[str | Path], device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, save: str | Path | None = None
) -> Iterator[CaseResult]:
    """Run every case below some folders, one after the other.

    Args:
        roots: folders to search.
        device: where to compute.
        dtype: floating type to compute in.
        save: folder for the computed tensors.

    Yields:
        The result of each case.

    Raises:
        FileNotFoundError: if a folder does not exist or holds no case; before anything runs.
    """
    found = [path for root in roots for path in discover(root)]
    for path in found:
        yield check_case(Case(path.resolve(), torch.device(device), dtype), Path(save) if save is not None else None)


def verify(
    roots: Sequence[str | Path],
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    save: str | Path | None = None,
    as_json: bool = False,
) -> int:
    """Run every case below some folders and print each tensor's error against its tolerance.

    Args:
        roots: folders to search.
        device: where to compute.
        dtype: floating type to compute in.
        save: folder for the computed tensors, `<system>/<case>.safetensors`.
        as_json: print one JSON list instead of text.

    Returns:
        Exit code: 1 if a case failed, else 0.
    """
    return report(run_cases(roots, device, dtype, save), as_json)


def report(results: Iterator[CaseResult], as_json: bool = False) -> int:
    """Print results as they come, then a summary.

    Returns:
        Exit code: 1 if a case failed, else 0.
    """
    done = []
    for result in results:
        done.append(result)
        if not as_json:
            print(result, flush=True)
    counts = {status: sum(result.status == status for result in done) for status in ("ok", "failed", "skipped", "computed")}
    if as_json:
        print(json.dumps({"summary": counts, "cases": [asdict(result) for result in done]}, indent=1))
    else:
        print(", ".join(f"{count} {status}" for status, count in counts.items() if count))
    return int(counts["failed"] > 0)
