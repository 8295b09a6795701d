"""What every converter shares: tables that map official weight names to ours in both directions, strictly.

A system has one file `genkit/convert/<system>.py`. It holds a table of rows and says which official files exist:

    OFFICIAL: tuple[OfficialModel, ...]   what its authors published
    FILES: tuple[str, ...]                file names looked for in an official folder, best first
    COMPONENT: str                        name of the model inside a pipeline ("transformer", "vqvae")
    PIPELINE: str | None                  class of the pipeline it belongs to
    WRAPPERS: tuple[str, ...]             keys under which the state dict may lie in a file, where it is not "state_dict"
    read(path) -> (state, note, options)  reader of files that are no plain checkpoints, None for others; optional
    options(path) -> options              what lies beside a file and tells options of `from_official`; optional
    WHOLE: bool                           its files also hold models of other systems, which are asked after it; optional
    companions(path) -> components        those models and settings, for the pipeline; optional
    recognise(shapes) -> bool             does a file with these keys and shapes hold this system?
    from_official(state, **options) -> (model, report)
    to_official(model) -> state
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from genkit.checks import misshapen_keys, shorten, tell_differences

Module = TypeVar("Module", bound=nn.Module)
Names = str | tuple[str, ...]
GROUPS = {"i": r"\d+", "j": r"\d+", "p": r"weight|bias", "rest": r".+"}


@dataclass(frozen=True)
class OfficialModel:
    """A model as its authors published it.

    Args:
        name: short name ("enat-l-256").
        source: where the authors keep it, in words or as a URL.
        files: file names there.
        licence: licence of the weights as stated by the authors, "none stated" if they did not.
        parameters: number of weights.
        memory_gb: memory needed to run it in fp32, in GB.
        options: arguments of `from_official` that the file does not tell.
        hub_id: repository on the hub, if there is one.
        note: what else a user has to know.
    """

    name: str
    source: str
    files: tuple[str, ...]
    licence: str
    parameters: int
    memory_gb: float
    options: Mapping[str, Any] = field(default_factory=dict)
    hub_id: str | None = None
    note: str = ""


@dataclass
class ConversionReport:
    """What a conversion did with every official key.

    Args:
        mapped: official key -> our keys.
        dropped: official key -> why it is not needed.
    """

    system: str
    mapped: dict[str, tuple[str, ...]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.system}: {len(self.mapped)} tensors mapped, {len(self.dropped)} dropped"]
        reasons: dict[str, list[str]] = {}
        for key, reason in self.dropped.items():
            reasons.setdefault(reason, []).append(key)
        lines += [f"  dropped {shorten(keys)}: {reason}" for reason, keys in reasons.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class Row:
    """One rule of a table: official names -> our names.

    Names are patterns. `{i}` and `{j}` stand for numbers, `{p}` for weight or bias, `{rest}` for anything, other letters for one part
    of a name; both sides use the same letters.

    Args:
        official: official name, or several that make up our tensors together.
        ours: our name, or several.
        load: official tensor -> ours (lists of tensors, in the order of the names, where a side has several); None copies.
        save: the way back; None copies.
    """

    official: Names
    ours: Names
    load: Callable[[Any], Any] | None = None
    save: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class Drop:
    """Official names that are deliberately left out.

    Args:
        official: pattern of the names.
        reason: why they are not needed.
        make: our state dict -> official tensors, where a strict reader of the official file would miss them.
    """

    official: str
    reason: str
    make: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None


def split_qkv(tensors: list[Tensor]) -> list[Tensor]:
    """Return rows q and kv of one tensor with the rows [q; k; v]."""
    third = len(tensors[0]) // 3
    return [tensors[0][:third].clone(), tensors[0][third:].clone()]


def halves(tensors: list[Tensor]) -> list[Tensor]:
    """Return the two halves of one tensor's rows."""
    return [part.clone() for part in tensors[0].chunk(2)]


def joined(tensors: list[Tensor]) -> list[Tensor]:
    """Return the rows of several tensors as one: the way back of `split_qkv` and `halves`."""
    return [torch.cat(tensors)]


class KeyTable:
    """Rows that map an official state dict to ours and back; the first row that fits a key applies.

    Args:
        system: name for messages and reports.
        rows: the rules.

    Raises:
        ValueError: if the two sides of a row use different letters.

    Example:
        >>> table = KeyTable("toy", [Row("net.{i}.fc.{p}", "layers.{i}.linear.{p}"), Drop("step", "training counter")])
        >>> ours, report = table.to_ours({"net.0.fc.bias": torch.zeros(2), "step": torch.zeros(1)}, {"layers.0.linear.bias": (2,)})
        >>> list(ours), list(report.dropped)
        (['layers.0.linear.bias'], ['step'])
    """

    def __init__(self, system: str, rows: Sequence[Row | Drop]) -> None:
        self.system = system
        self.rows = [row for row in rows if isinstance(row, Row)]
        self.drops = [row for row in rows if isinstance(row, Drop)]
        for row in self.rows:
            letters = {frozenset(re.findall(r"{(\w+)}", name)) for name in (*_names(row.official), *_names(row.ours))}
            if len(letters) > 1:
                raise ValueError(
                    f"{system}: the names of row {row.official} -> {row.ours} use different letters: {[sorted(x) for x in letters]}."
                )

    def to_ours(
        self, official: Mapping[str, Tensor], expected: Mapping[str, Tensor] | Mapping[str, Sequence[int]]
    ) -> tuple[dict[str, Tensor], ConversionReport]:
        """Map an official state dict to ours.

        Args:
            official: official tensors by key.
            expected: our keys with tensors (meta ones do) or shapes; `model.state_dict()`.

        Returns:
            Our state dict and the report.

        Raises:
            ValueError: if a key is unknown, missing or has a wrong shape; names the first ten of each and their number.
        """
        report = ConversionReport(self.system)
        ours, used, incomplete = _apply(self.rows, official, forward=True)
        report.mapped = used
        for key in official.keys() - used.keys():
            drop = next((drop for drop in self.drops if _pattern(drop.official).fullmatch(key)), None)
            if drop:
                report.dropped[key] = drop.reason
        shapes = {key: tuple(value.shape) if isinstance(value, Tensor) else tuple(value) for key, value in expected.items()}
        missing = incomplete + [self._named(key) for key in shapes.keys() - ours.keys()]
        unexpected = [key for key in official if key not in used and key not in report.dropped]
        strays = [f"{key} (of {official_key})" for official_key, keys in used.items() for key in keys if key in ours and key not in shapes]
        wrong = (line.split(" ", 1) for line in misshapen_keys(shapes, {key: value.shape for key, value in ours.items()}))
        misshapen = [f"{self._named(key)} {rest}" for key, rest in wrong]
        raise_differences(f"{self.system}: the checkpoint does not fit", missing, unexpected + strays, misshapen)
        return ours, report

    def to_official(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Map our state dict to the official layout, with the dropped keys that a strict reader wants.

        Raises:
            ValueError: if one of our keys has no official name.
        """
        official, used, incomplete = _apply(self.rows, ours, forward=False)
        unknown = [key for key in ours if key not in used]
        raise_differences(f"{self.system}: no official name", incomplete, unknown, [])
        for drop in self.drops:
            official |= drop.make(ours) if drop.make else {}
        return official

    def _named(self, ours: str) -> str:
        """Return the official names behind one of our keys, for messages."""
        for row in self.rows:
            for name in _names(row.ours):
                if match := _pattern(name).fullmatch(ours):
                    return " + ".join(_fill(official, match.groupdict()) for official in _names(row.official))
        return ours


def raise_differences(intro: str, missing: Sequence[str], unexpected: Sequence[str], misshapen: Sequence[str]) -> None:
    """Raise one error that lists what differs between a checkpoint and a model, or return if nothing does.

    Raises:
        ValueError: with the first ten keys of each sort and their number.
    """
    text = tell_differences(missing, unexpected, misshapen)
    if text:
        raise ValueError(f"{intro}: {text}. Check that the file and the options belong to the same model.")


def build_empty(cls: Callable[..., Module], **config: Any) -> Module:
    """Build a model on the meta device: shapes without memory.

    Args:
        cls: class of the model.
        **config: its constructor's arguments.

    Returns:
        The model; `state_dict()` gives the expected shapes, `fill` gives it weights.
    """
    with torch.device("meta"):
        return cls(**config)


def fill(model: Module, state: Mapping[str, Tensor]) -> Module:
    """Give a model its weights, strictly, and put it in eval mode.

    Buffers outside the state dict must not be on the meta device: build a model that has such buffers without `build_empty`.

    Args:
        model: a model, on the meta device or not.
        state: all of its tensors; floats become fp32.

    Returns:
        The same model.
    """
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def _names(names: Names) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _pattern(name: str) -> re.Pattern[str]:
    """Return the regular expression of a name with letters in braces."""
    parts = re.split(r"{(\w+)}", name)
    text, seen = "", set()
    for index, part in enumerate(parts):
        if index % 2 == 0:
            text += re.escape(part)
        else:
            text += f"(?P={part})" if part in seen else f"(?P<{part}>{GROUPS.get(part, '[^.]+')})"
            seen.add(part)
    return re.compile(text)


def _fill(name: str, letters: Mapping[str, str]) -> str:
    return re.sub(r"{(\w+)}", lambda match: letters[match[1]], name)


def _apply(
    rows: Sequence[Row], source: Mapping[str, Tensor], forward: bool
) -> tuple[dict[str, Tensor], dict[str, tuple[str, ...]], list[str]]:
    """Move tensors through the rows.

    Returns:
        Tensors under their new names, source key -> new keys, and source keys that an incomplete group lacks.
    """
    compiled = []
    for row in rows:
        sides = (_names(row.official), _names(row.ours), row.load) if forward else (_names(row.ours), _names(row.official), row.save)
        compiled.append((*sides, [_pattern(name) for name in sides[0]]))
    result: dict[str, Tensor] = {}
    used: dict[str, tuple[str, ...]] = {}
    missing: list[str] = []
    for key in source:
        if key in used:
            continue
        for given, wanted, transform, patterns in compiled:
            match = next((match for match in (pattern.fullmatch(key) for pattern in patterns) if match), None)
            if match is None:
                continue
            group = [_fill(name, match.groupdict()) for name in given]
            names = tuple(_fill(name, match.groupdict()) for name in wanted)
            used |= dict.fromkeys((name for name in group if name in source), names)
            if absent := [name for name in group if name not in source]:
                missing += absent
                break
            tensors = _transformed([source[name] for name in group], transform, len(names))
            result.update(zip(names, tensors, strict=True))
            break
    return result, used, missing


def _transformed(tensors: list[Tensor], transform: Callable[[Any], Any] | None, count: int) -> list[Tensor]:
    """Apply a row's transform: one tensor is passed and returned bare when both sides have one name."""
    if transform is None:
        return tensors
    if len(tensors) == 1 and count == 1:
        return [transform(tensors[0])]
    return list(transform(tensors))
