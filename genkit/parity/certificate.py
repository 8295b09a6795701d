"""Certificates of packaged models: a few calls with their seeds, tokens and pictures, to see whether another machine computes the same.

A model folder holds `certificate.safetensors`. Its metadata are the calls and the tolerance; its tensors are `<i>.images` (bytes
[b, h, w, 3], of clips [b, f, h, w, 3]) and, where the system has codes, `<i>.tokens` of call i.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from genkit.parity.base import CaseResult, report
from genkit.parity.compare import compare
from genkit.pipelines.base import GenPipeline
from genkit.pipelines.loading import locate
from genkit.weights import read_safetensors

FILE = "certificate.safetensors"
TOLERANCE = {
    "default": {"rtol": 0.0, "atol": 0.0},
    "rules": [{"match": "*.tokens", "exact": True}, {"match": "*.images", "atol": 1.0}],
}


def compute(pipe: GenPipeline, calls: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Run the calls of a certificate.

    Args:
        pipe: the pipeline.
        calls: keyword arguments of each call, with `generator` as a list of seeds.

    Returns:
        Tokens and pictures by name.
    """
    results = {}
    pipe.set_progress_bar_config(disable=True)
    for index, call in enumerate(calls):
        output = pipe(**call, output_type="np")
        pictures = output.images if "images" in output else output.frames
        results[f"{index}.images"] = torch.from_numpy((pictures * 255).round()).to(torch.uint8).contiguous()
        if output.get("tokens") is not None:
            results[f"{index}.tokens"] = output.tokens.cpu().contiguous()
    return results


def write(folder: str | Path, calls: Sequence[Mapping[str, Any]]) -> Path:
    """Compute and store the certificate of a model folder, in fp32 on the CPU.

    Args:
        folder: of the pipeline.
        calls: keyword arguments of each call, plain values; `generator` must be a list of seeds.

    Returns:
        The file.

    Raises:
        ValueError: if a call has no list of seeds.
    """
    for call in calls:
        if not isinstance(call.get("generator"), list):
            raise ValueError(f"a certified call needs generator=[seed, ...], one per picture, got {call.get('generator')!r}.")
    path = Path(folder) / FILE
    results = compute(GenPipeline.from_pretrained(Path(folder)), calls)
    save_file(results, path, metadata={"calls": json.dumps(list(calls)), "tolerance": json.dumps(TOLERANCE)})
    return path


def check(name_or_path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> CaseResult:
    """Repeat the calls of a model's certificate and compare.

    Args:
        name_or_path: packaged name or pipeline folder.
        device: where to compute.
        dtype: floating type to compute in.

    Returns:
        The result; tokens are exact, pictures within one level of 255.

    Raises:
        FileNotFoundError: if the model has no certificate.
        ValueError: for an unknown name.
    """
    folder = locate(name_or_path)
    path = None if folder is None else folder / FILE
    if path is None or not path.is_file():
        raise FileNotFoundError(f"{str(name_or_path)!r} has no {FILE}; only packaged models carry one (`genkit list`).")
    references = read_safetensors(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if not {"calls", "tolerance"} <= metadata.keys():
        raise ValueError(f"{str(path)!r} lists no calls in its metadata; it is no certificate.")
    start = time.perf_counter()
    pipe = GenPipeline.from_pretrained(name_or_path, torch_dtype=dtype, device=device)
    checks = compare(compute(pipe, json.loads(metadata["calls"])), references, json.loads(metadata["tolerance"]))
    status = "ok" if all(item.ok for item in checks) else "failed"
    return CaseResult(str(name_or_path), "certificate", status, "", time.perf_counter() - start, checks)


def verify(name_or_path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, as_json: bool = False) -> int:
    """Check a model's certificate and print the errors against their tolerance.

    Returns:
        Exit code: 1 if a number is outside its tolerance, else 0.
    """
    return report(iter([check(name_or_path, device, dtype)]), as_json)
