"""Certificates of packaged models: a few calls with their seeds and what came out, to see whether another machine computes the same.

A model folder holds `certificate.safetensors`. Its metadata are the calls and the tolerance; its tensors are of call i

- pictures and clips: `<i>.images` (bytes [b, h, w, 3], [b, f, h, w, 3]) and, where the system has codes, `<i>.tokens`
- shapes: `<i>.latents`, and of mesh j `<i>.<j>.measures`: area, volume and box
- artist meshes: `<i>.<j>.tokens` and `<i>.<j>.vertices`
- meshes that the call is given: `<i>.given.<argument>.vertices` and `.faces`
"""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
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
    "rules": [
        {"match": "*.tokens", "exact": True},
        {"match": "*.images", "atol": 1.0},
        {"match": "*.latents", "atol": 2e-3},
        {"match": "*.measures", "atol": 5e-3},
        {"match": "*.vertices", "atol": 1e-4},
    ],
}


def compute(pipe: GenPipeline, calls: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Run the calls of a certificate.

    Args:
        pipe: the pipeline.
        calls: keyword arguments of each call, with `generator` as a list of seeds.

    Returns:
        What came out by name, see above.
    """
    results: dict[str, Tensor] = {}
    pipe.set_progress_bar_config(disable=True)
    makes_pictures = "output_type" in inspect.signature(pipe.__call__).parameters
    for index, call in enumerate(calls):
        if not makes_pictures:
            results |= {f"{index}.{name}": tensor for name, tensor in _meshes(pipe(**call)).items()}
            continue
        output = pipe(**call, output_type="np")
        pictures = output.images if "images" in output else output.frames
        results[f"{index}.images"] = torch.from_numpy((pictures * 255).round()).to(torch.uint8).contiguous()
        if output.get("tokens") is not None:
            results[f"{index}.tokens"] = output.tokens.cpu().contiguous()
    return results


def _meshes(output: Any) -> dict[str, Tensor]:
    """Return what is kept of shapes or artist meshes, by name."""
    if "latents" in output:
        found = {"latents": output.latents.float().cpu().contiguous()}
        for i, mesh in enumerate(output.meshes):
            found[f"{i}.measures"] = torch.tensor([mesh.area, mesh.volume, *mesh.bounds.flatten().tolist()], dtype=torch.float32)
        return found
    pairs = enumerate(zip(output.meshes, output.tokens, strict=True))
    tensors = {i: (torch.from_numpy(np.array(tokens)), torch.from_numpy(np.array(mesh.vertices)).float()) for i, (mesh, tokens) in pairs}
    return {f"{i}.{name}": tensor for i, both in tensors.items() for name, tensor in zip(("tokens", "vertices"), both, strict=True)}


def _given(calls: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Return calls with None for every mesh, and the meshes' tensors by name."""
    plain, tensors = [], {}
    for index, call in enumerate(calls):
        meshes = {name: value for name, value in call.items() if hasattr(value, "faces")}
        plain.append({**call, **dict.fromkeys(meshes)})
        for name, mesh in meshes.items():
            for part in ("vertices", "faces"):
                tensors[f"{index}.given.{name}.{part}"] = torch.from_numpy(np.array(getattr(mesh, part)))
    return plain, tensors


def _restored(calls: Sequence[Mapping[str, Any]], tensors: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Return calls with their meshes; the meshes' tensors are taken out of `tensors`."""
    import trimesh

    found = [dict(call) for call in calls]
    for key in [key for key in tensors if ".given." in key and key.endswith(".vertices")]:
        index, _, name, _ = key.split(".")
        vertices, faces = tensors.pop(key).numpy(), tensors.pop(key.removesuffix("vertices") + "faces").numpy()
        found[int(index)][name] = trimesh.Trimesh(vertices, faces, process=False)
    return found


def write(folder: str | Path, calls: Sequence[Mapping[str, Any]]) -> Path:
    """Compute and store the certificate of a model folder, in fp32 on the CPU.

    Args:
        folder: of the pipeline.
        calls: keyword arguments of each call, plain values or meshes; `generator` must be a list of seeds.

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
    plain, meshes = _given(calls)
    save_file({**results, **meshes}, path, metadata={"calls": json.dumps(plain), "tolerance": json.dumps(TOLERANCE)})
    return path


def check(name_or_path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> CaseResult:
    """Repeat the calls of a model's certificate and compare.

    Args:
        name_or_path: packaged name or pipeline folder.
        device: where to compute.
        dtype: floating type to compute in.

    Returns:
        The result; tokens are exact, pictures within one level of 255, vertices and latents nearly equal.

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
    calls = _restored(json.loads(metadata["calls"]), references)
    checks = compare(compute(pipe, calls), references, json.loads(metadata["tolerance"]))
    status = "ok" if all(item.ok for item in checks) else "failed"
    return CaseResult(str(name_or_path), "certificate", status, "", time.perf_counter() - start, checks)


def verify(name_or_path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, as_json: bool = False) -> int:
    """Check a model's certificate and print the errors against their tolerance.

    Returns:
        Exit code: 1 if a number is outside its tolerance, else 0.
    """
    return report(iter([check(name_or_path, device, dtype)]), as_json)
