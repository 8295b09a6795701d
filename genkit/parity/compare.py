"""Compare computed tensors with a golden case, by the rules of its tolerance.json.

The file holds `{"default": {"rtol", "atol"}, "rules": [...]}`. The first rule whose `match` glob fits a tensor's name applies:

    rtol, atol     elementwise bound atol + rtol |reference|; what a rule leaves out comes from "default"
    atol_of_max    adds this share of the largest |reference| to atol
    norm           bound on the L2 norm of the error relative to the reference's, instead of the elementwise bound
                   (besides it, if the rule names both)
    outside        share of the compared elements that may lie outside the elementwise bound
    where          {"tensor": t, "above": x}: compare only where reference tensor t exceeds x (trailing axes are added to t)
    exact          no error allowed
    skip           not compared; the value says why

Integer and boolean tensors are exact unless their rule names a bound. NaN and infinities must sit at the same places.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

Rule = Mapping[str, Any]
ELEMENTWISE = frozenset({"rtol", "atol", "atol_of_max", "exact"})


@dataclass(frozen=True)
class TensorCheck:
    """One tensor's error against its tolerance.

    Args:
        name: of the tensor.
        ok: whether it is within its tolerance.
        error: largest elementwise error, or the L2 error where only a norm is bounded.
        bound: what is allowed at the element that comes closest to, or exceeds, its bound most.
        outside: number of elements outside the bound.
        compared: number of elements compared.
        note: why it failed or was not compared, else empty.
    """

    name: str
    ok: bool
    error: float = 0.0
    bound: float = 0.0
    outside: int = 0
    compared: int = 0
    note: str = ""

    def __str__(self) -> str:
        verdict = "ok  " if self.ok else "FAIL"
        if self.note and not self.compared:
            return f"{verdict} {self.name}: {self.note}"
        extra = f", {self.outside} of {self.compared} outside" if self.outside else ""
        return f"{verdict} {self.name}: error {self.error:.3g}, bound {self.bound:.3g}{extra}{', ' + self.note if self.note else ''}"


def find_rule(name: str, tolerance: Rule) -> Rule:
    """Return the first rule that fits a tensor's name, or an empty one."""
    return next((rule for rule in tolerance["rules"] if fnmatchcase(name, rule["match"])), {})


def compare(results: Mapping[str, Tensor], references: Mapping[str, Tensor], tolerance: Rule) -> list[TensorCheck]:
    """Compare every stored tensor with what was computed.

    Args:
        results: computed tensors by name; names that are not stored are ignored.
        references: stored tensors.
        tolerance: content of tolerance.json.

    Returns:
        One check per stored tensor, sorted by name.
    """
    checks = []
    for name in sorted(references):
        rule = find_rule(name, tolerance)
        if "skip" in rule:
            checks.append(TensorCheck(name, True, note=f"skipped: {rule['skip']}"))
        elif name not in results:
            checks.append(TensorCheck(name, False, note="missing in the results"))
        else:
            checks.append(compare_tensor(results[name], references, name, tolerance))
    return checks


def compare_tensor(result: Tensor, references: Mapping[str, Tensor], name: str, tolerance: Rule) -> TensorCheck:
    """Compare one tensor with its reference.

    Args:
        result: computed tensor.
        references: stored tensors; a `where` rule looks up another one.
        name: of the tensor.
        tolerance: content of tolerance.json.

    Returns:
        The check.
    """
    reference, rule = references[name], find_rule(name, tolerance)
    if result.shape != reference.shape:
        return TensorCheck(name, False, note=f"shape {list(result.shape)}, expected {list(reference.shape)}")
    keep = _compared(references, reference.shape, rule)
    bound = _bound(reference, rule, tolerance["default"])[keep]
    got, wanted = result.detach().cpu().double()[keep], reference.double()[keep]
    same = (got == wanted) | (got.isnan() & wanted.isnan())
    error = torch.where(same, 0.0, (got - wanted).abs().nan_to_num(torch.inf, posinf=torch.inf))
    if not error.numel():
        return TensorCheck(name, True, note="no element to compare")
    outside = int((error > bound).sum())
    worst = int((error - bound).nan_to_num(torch.inf).argmax())
    elementwise = TensorCheck(
        name, outside <= rule.get("outside", 0.0) * error.numel(), error[worst].item(), bound[worst].item(), outside, error.numel()
    )
    if "norm" not in rule:
        return elementwise
    limit = rule["norm"] * wanted[wanted.isfinite()].norm().item()
    norm = error.norm().item()
    if norm <= limit and ELEMENTWISE & rule.keys():
        return elementwise
    return TensorCheck(name, norm <= limit, norm, limit, 0, error.numel(), "L2 norm")


def _bound(reference: Tensor, rule: Rule, default: Rule) -> Tensor:
    """Return the largest error allowed at each element of a reference, float64."""
    size = torch.where(reference.isfinite(), reference.double().abs(), 0.0)
    if rule.get("exact") or not (reference.is_floating_point() or ELEMENTWISE & rule.keys()):
        return torch.zeros_like(size)
    rtol, atol = (rule.get(key, default[key]) for key in ("rtol", "atol"))
    if size.numel():
        atol += rule.get("atol_of_max", 0.0) * size.max().item()
    return atol + rtol * size


def _compared(references: Mapping[str, Tensor], shape: torch.Size, rule: Rule) -> Tensor:
    """Return the mask of the elements to compare."""
    if "where" not in rule:
        return torch.ones(shape, dtype=torch.bool)
    mask = references[rule["where"]["tensor"]] > rule["where"]["above"]
    return mask.reshape(mask.shape + (1,) * (len(shape) - mask.ndim)).expand(shape)
