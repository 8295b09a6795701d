"""What mixers promise, the base classes they share, and the table of their names.

A mixer is a frozen config (options, capabilities, `build`) and a module. To add one: subclass `MixerConfig`, put `@register("name")` on it,
and import its file in `genkit/blocks/stack.py`. Mixers of whole grids have a base of their own, `GridMixer`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from genkit.blocks.caches import KVCache, ShiftCache, StateCache
from genkit.blocks.layout import Layout
from genkit.checks import unknown

Cache = KVCache | StateCache | ShiftCache
Context = Tensor | tuple[Tensor, Tensor]
"""Context tokens [b, m, d_c], or the keys and values that `project_context` made of them."""


@dataclass(frozen=True)
class Caps:
    """What a mixer can do; as an argument, what a model needs.

    Args:
        set_op: equivariant to permutations of the tokens together with their positions.
        causal: output i depends on tokens up to i only.
        cache: chunks passed one after the other with `new_cache()` give the full result.
        grid: works on a full grid only (a demand on the caller, so never part of what a model needs).
        context: takes other tokens as keys and values.
        mask: honours an attention mask.
    """

    set_op: bool = False
    causal: bool = False
    cache: bool = False
    grid: bool = False
    context: bool = False
    mask: bool = False

    def missing(self, needs: Caps) -> list[str]:
        """Return the names of the capabilities in `needs` that are absent here (without `grid`)."""
        return [f.name for f in dataclasses.fields(self) if f.name != "grid" and getattr(needs, f.name) and not getattr(self, f.name)]


def option(default: Any, *accepts: type | str | None) -> Any:
    """Declare an option of a mixer: its default and the types or words it accepts (None where None is a value)."""
    return dataclasses.field(default=default, metadata={"accepts": accepts})


class MixerConfig:
    """Base of the frozen configs: checks option kinds and writes itself as in a stack string."""

    name: ClassVar[str] = ""
    offers: ClassVar[Mapping[str, str]] = {}
    """For arguments that only some mixers honour: argument -> how this one is written to take it."""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            _check_option(f"{self.name} option {f.name}", getattr(self, f.name), f.metadata["accepts"])

    @property
    def caps(self) -> Caps:
        """Capabilities that follow from the options."""
        raise NotImplementedError

    def build(self, dim: int, *, heads: int | None = None, context_dim: int | None = None) -> TokenMixer | ChannelMixer:
        """Build the module for width `dim`; `heads` and `context_dim` are the model's defaults."""
        raise NotImplementedError

    def __str__(self) -> str:
        changed = [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]  # type: ignore[arg-type]
        return self.name + (f"({', '.join(f'{key}={_literal(value)}' for key, value in changed)})" if changed else "")


class TokenMixer(nn.Module):
    """Base of the modules that move information between tokens; `config` holds the options."""

    config: MixerConfig

    def forward(
        self,
        x: Tensor,
        *,
        layout: Layout | None = None,
        context: Context | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Mix tokens x [b, n, d] and return [b, n, d]."""
        raise NotImplementedError

    def new_cache(self, batch: int, max_len: int, *, device: torch.device | str, dtype: torch.dtype) -> Cache | None:
        """Return an empty cache for `max_len` tokens, or None where none is needed to go on chunk by chunk.

        Raises:
            ValueError: if this mixer cannot work chunk by chunk.
        """
        raise NotImplementedError

    def project_context(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of context tokens [b, m, d_c], accepted by `forward` in their place."""
        raise refusal(self.config, "context")


class ChannelMixer(nn.Module):
    """Base of the modules that work on channels, each token alone or (`conv_mlp`) beside its neighbours; `config` holds the options."""

    config: MixerConfig

    def forward(self, x: Tensor, *, layout: Layout | None = None, width: float | None = None) -> Tensor:
        """Map tokens x [b, n, d] to [b, n, d]; `width` picks a nested sub-network where the mixer has some."""
        raise NotImplementedError


MIXERS: dict[str, type[MixerConfig]] = {}
C = TypeVar("C", bound=type[MixerConfig])


def register(name: str) -> Callable[[C], C]:
    """Enter a config class in the table of mixers under `name`."""

    def enter(config: C) -> C:
        if name in MIXERS:
            raise ValueError(f"a mixer named {name!r} is registered already ({MIXERS[name].__module__}).")
        config.name = name
        MIXERS[name] = config
        return config

    return enter


def refusal(config: MixerConfig, argument: str) -> ValueError:
    """Return the error of a mixer that cannot honour an argument, with the mixers that can."""
    able = sorted(mixer.offers[argument] for mixer in MIXERS.values() if argument in mixer.offers)
    return ValueError(f"{config} does not take {argument}. Mixers that do: {', '.join(able) or 'none'}.")


def refuse_arguments(config: MixerConfig, **arguments: object) -> None:
    """Raise for the first argument that is given though the mixer cannot honour it.

    Raises:
        ValueError: naming the argument and the mixers that take it.
    """
    for name, value in arguments.items():
        if value is not None:
            raise refusal(config, name)


def _check_option(name: str, value: object, accepts: tuple[type | str | None, ...]) -> None:
    """Check one option against the types and words it accepts."""
    words = [a for a in accepts if isinstance(a, str)]
    types = tuple(a for a in accepts if isinstance(a, type))
    if value is None and None in accepts:
        return
    if isinstance(value, str) and words:
        if value not in words:
            raise ValueError(unknown(value, words, f"value of {name}:"))
        return
    number_as_bool = isinstance(value, bool) and bool not in types
    if number_as_bool or not isinstance(value, types):
        accepted = [a.__name__ if isinstance(a, type) else repr(a) for a in accepts]
        raise ValueError(f"{name} must be {' or '.join(accepted)}, got {value!r}.")


def _literal(value: object) -> str:
    """Write an option value; whole floats as integers, so that equal configs read the same."""
    if isinstance(value, tuple):
        inner = ", ".join(_literal(v) for v in value)
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    return repr(int(value)) if isinstance(value, float) and value.is_integer() else repr(value)
