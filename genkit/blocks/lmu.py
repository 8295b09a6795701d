"""Legendre memory: one number per token is remembered exactly over a window, as the coefficients of Legendre polynomials.

A linear recurrence with a fixed dense transition, computed chunk by chunk. One scalar input per token limits what it can hold.

Source: Voelker et al., Legendre Memory Units, NeurIPS 2019; Liu et al., LMUFormer, ICLR 2024, arXiv 2402.04882.
Letters: b batch, n tokens, d width, m coefficients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkit.blocks.caches import StateCache
from genkit.blocks.caps import Cache, Caps, Context, MixerConfig, TokenMixer, option, refuse_arguments, register
from genkit.blocks.layout import Layout
from genkit.checks import check_shape

CHUNK = 64  # tokens


def legendre_system(memory: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return A [m, m] and B [m], float64: one step of the memory, inputs held in between.

    Args:
        memory: m.
        theta: length of the window, in tokens.
    """
    i, j = torch.meshgrid(torch.arange(memory), torch.arange(memory), indexing="ij")
    sign = torch.where(i < j, -1.0, (-1.0) ** (i - j + 1))
    a = (2 * i + 1) / theta * sign
    b = (2 * torch.arange(memory) + 1) * (-1.0) ** torch.arange(memory) / theta
    whole = torch.zeros(memory + 1, memory + 1, dtype=torch.float64)
    whole[:memory, :memory], whole[:memory, memory] = a.double(), b.double()
    step = torch.linalg.matrix_exp(whole)
    return step[:memory, :memory], step[:memory, memory]


@register("lmu")
@dataclass(frozen=True)
class LMUConfig(MixerConfig):
    """Options of a Legendre memory.

    Args:
        memory: m.
        theta: length of the window, in tokens.
    """

    memory: int = option(64, int)
    theta: float = option(256, float, int)

    offers: ClassVar[Mapping[str, str]] = {"cache": "lmu"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory < 1 or self.theta <= 0:
            raise ValueError(f"lmu: memory and theta must be positive, got {self.memory} and {self.theta}.")

    @property
    def caps(self) -> Caps:
        """Goes on from its coefficients."""
        return Caps(causal=True, cache=True)

    def build(self, dim: int, *, heads: int | None = None, context_dim: int | None = None) -> LegendreMemory:
        """Build the module for width `dim`."""
        return LegendreMemory(dim, self)


class LegendreMemory(TokenMixer):
    """h_t = relu(proj([M_t; x_t])), M_t = A M_{t-1} + B relu(u(x_t)).

    Args:
        dim: d of the tokens.
        config: the options.
        out_dim: width of the result; d if None.
    """

    transition: Tensor
    entry: Tensor

    def __init__(self, dim: int, config: LMUConfig, out_dim: int | None = None) -> None:
        super().__init__()
        self.config: LMUConfig = config
        self.u, self.proj = nn.Linear(dim, 1), nn.Linear(config.memory + dim, dim if out_dim is None else out_dim)
        a, b = legendre_system(config.memory, config.theta)
        self.register_buffer("transition", a.float())
        self.register_buffer("entry", b.float())

    def forward(
        self,
        x: Tensor,
        *,
        layout: Layout | None = None,
        context: Context | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Remember and read.

        Args:
            x: [b, n, d].
            layout: unused; part of the protocol.
            context, mask: not taken.
            cache: from `new_cache`; the tokens x follow those it has seen.

        Returns:
            [b, n, d].
        """
        refuse_arguments(self.config, context=context, mask=mask)
        check_shape(x, "LegendreMemory: x", "b n d", d=self.u.in_features)
        if cache is not None and not isinstance(cache, StateCache):
            raise TypeError(f"lmu: cache must be a StateCache from new_cache(), got {type(cache).__name__}.")
        state = x.new_zeros(len(x), self.config.memory, dtype=torch.float32) if cache is None else cache["state"]
        found, state = self.remember(F.relu(self.u(x)).squeeze(-1).float(), state)
        if cache is not None:
            cache["state"] = state
        return F.relu(self.proj(torch.cat([found.to(x.dtype), x], dim=-1)))

    def remember(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return coefficients [b, n, m] of inputs [b, n] after coefficients [b, m], and the last ones.

        Inputs are taken chunk by chunk: M_i = A^(i+1) M + sum_j A^(i-j) B u_j over j <= i.
        """
        if not inputs.shape[1]:
            return inputs.new_zeros(len(inputs), 0, self.config.memory), state
        size = min(CHUNK, inputs.shape[1])
        powers = [torch.eye(self.config.memory, device=inputs.device, dtype=torch.float64)]
        for _ in range(size):
            powers.append(self.transition.double() @ powers[-1])
        places = torch.arange(size, device=inputs.device)
        distance = places[:, None] - places
        response = (torch.stack(powers[:size]) @ self.entry.double())[distance.clamp(min=0)]  # [i, j, m]
        response = torch.where(distance[..., None] >= 0, response, 0.0).to(inputs.dtype)
        carried = torch.stack(powers[1:]).to(inputs.dtype)  # [i, m, m]
        found = []
        for part in inputs.split(size, dim=1):
            n = part.shape[1]
            inside = torch.einsum("bj,ijm->bim", part, response[:n, :n])
            found.append(inside + torch.einsum("imk,bk->bim", carried[:n], state))
            state = found[-1][:, -1]
        return torch.cat(found, dim=1), state

    def new_cache(self, batch: int, max_len: int, *, device: torch.device | str, dtype: torch.dtype) -> StateCache:
        """Return empty coefficients, float32 whatever the dtype of the tokens, for any number of tokens."""
        return StateCache(state=torch.zeros(batch, self.config.memory, device=device))
