"""Residual branches around mixers, and blocks of branches.

Letters: b batch, n tokens, m context tokens, d width, d_c context and condition width, k modulation vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkit.blocks.caps import MIXERS, Cache, ChannelMixer, Context, TokenMixer, refusal, refuse_arguments
from genkit.blocks.layout import Layout
from genkit.blocks.modulation import Modulation, modulate
from genkit.blocks.norms import build_norm
from genkit.checks import check_shape, choose

T = TypeVar("T")
RESIDUALS = ("pre", "post", "sandwich", "none")


class Branch(nn.Module):
    """One residual sub-layer around a mixer f.

    pre: x + gate * scale * f(mod(norm(x))). post: norm(x + scale * f(x)). sandwich: as pre with a second norm after f.
    none: scale * f(norm(x)).

    Args:
        f: a token or channel mixer.
        dim: d.
        norm: kind of norm, see `build_norm`.
        eps: of the norms.
        residual: "pre", "post", "sandwich" or "none".
        modulated: takes vectors (shift, scale, gate), or (shift, scale, context shift, context scale, gate).
        context_norm: kind of norm of the context tokens; "none" leaves them alone.
        modulate_context: the context is modulated too (5 vectors); needs `modulated`.
        context_dim: d_c; d if None.
        layer_scale: start value of a learned factor per channel on f; none if None.
        dropout: of f's result, in training.
    """

    def __init__(
        self,
        f: TokenMixer | ChannelMixer,
        dim: int,
        norm: str = "ln",
        *,
        eps: float = 1e-5,
        residual: str = "pre",
        modulated: bool = False,
        context_norm: str = "none",
        modulate_context: bool = False,
        context_dim: int | None = None,
        layer_scale: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        choose(residual, RESIDUALS, "residual")
        if modulated and residual in ("post", "none"):
            raise ValueError(f"Branch: modulated=True needs residual 'pre' or 'sandwich', got {residual!r}.")
        self.takes_context = f.config.caps.context
        if modulate_context and not (modulated and self.takes_context):
            raise ValueError(f"Branch: modulate_context=True needs modulated=True and a mixer that takes context, got {f.config}.")
        self.f = f
        self.dim = dim
        self.adapter: nn.Module | None = None  # see genkit.blocks.adapter
        self.residual, self.dropout = residual, dropout
        self.num_vectors = (5 if modulate_context else 3) if modulated else 0
        self.norm = build_norm(norm, dim, eps)
        self.norm_out = build_norm(norm, dim, eps) if residual == "sandwich" else nn.Identity()
        self.context_norm = build_norm(context_norm, dim if context_dim is None else context_dim, eps)
        self.layer_scale = None if layer_scale is None else nn.Parameter(torch.full((dim,), float(layer_scale)))

    def forward(
        self,
        x: Tensor,
        *,
        mod: Tensor | None = None,
        layout: Layout | None = None,
        context: Context | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        width: float | None = None,
    ) -> Tensor:
        """Apply the branch.

        Args:
            x: [b, n, d].
            mod: vectors [b, num_vectors, d] of a modulated branch.
            layout: made once per model call.
            context: tokens [b, m, d_c] or the pair `project_context` made of them; token mixers only.
            mask: bool, True = attend; token mixers only.
            cache: of this branch; token mixers only.
            width: nested width; channel mixers only.

        Returns:
            [b, n, d].
        """
        normed = x if self.residual == "post" else self.norm(x)
        vectors = self._vectors(mod)
        if vectors:
            normed = modulate(normed, vectors[0], vectors[1])
        if isinstance(self.f, ChannelMixer):
            refuse_arguments(self.f.config, context=context, mask=mask, cache=cache)
            out = self.f(normed, layout=layout, width=width)
        else:
            refuse_arguments(self.f.config, width=width)
            if isinstance(context, Tensor):
                context = self._normed_context(context, vectors)
            out = self.f(normed, layout=layout, context=context, mask=mask, cache=cache)
        out = out if self.adapter is None or self.adapter.mode == "parallel" else out + self.adapter(out)
        out = self.norm_out(out)
        if self.dropout:
            out = F.dropout(out, self.dropout, self.training)
        out = out if self.layer_scale is None else out * self.layer_scale
        out = out if not vectors else out * vectors[-1].unsqueeze(1)
        if self.adapter is not None and self.adapter.mode == "parallel":
            out = out + self.adapter(x)
        if self.residual == "none":
            return out
        return self.norm(x + out) if self.residual == "post" else x + out

    def project_context(self, context: Tensor, mod: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return keys and values of context tokens, accepted by `forward` in their place.

        Args:
            context: [b, m, d_c].
            mod: vectors [b, num_vectors, d] of a modulated branch.
        """
        if not isinstance(self.f, TokenMixer):
            raise refusal(self.f.config, "context")
        return self.f.project_context(self._normed_context(context, self._vectors(mod)))

    def _normed_context(self, context: Tensor, vectors: tuple[Tensor, ...]) -> Tensor:
        """Norm context tokens, and modulate them where the branch has vectors for it."""
        context = self.context_norm(context)
        return modulate(context, vectors[2], vectors[3]) if len(vectors) == 5 else context

    def _vectors(self, mod: Tensor | None) -> tuple[Tensor, ...]:
        """Return the modulation vectors one by one; an error if they are missing or not wanted."""
        if mod is None and self.num_vectors == 0:
            return ()
        if mod is None or mod.ndim != 3 or mod.shape[1] != self.num_vectors:
            got = None if mod is None else list(mod.shape)
            raise ValueError(f"Branch({self.f.config}): mod must be [b, {self.num_vectors}, d] (0 vectors: None), got {got}.")
        return mod.unbind(1)


class Block(nn.Module):
    """Branches in order; owns the one Linear that gives all their modulation vectors.

    Args:
        branches: the branches.
        dim: d.
        cond_dim: width of the condition; None where no branch is modulated or vectors always come ready made.
    """

    def __init__(self, branches: Sequence[Branch], dim: int, *, cond_dim: int | None = None) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.dim = dim
        self.counts = [branch.num_vectors for branch in branches]
        total = sum(self.counts)
        self.modulation = Modulation(dim, total, cond_dim) if cond_dim is not None and total > 0 else None

    def forward(
        self,
        x: Tensor,
        cond: Tensor | None = None,
        layout: Layout | None = None,
        context: Context | Sequence[Context | None] | None = None,
        mask: Tensor | Sequence[Tensor | None] | None = None,
        cache: Sequence[Cache | None] | None = None,
        width: float | None = None,
    ) -> Tensor:
        """Apply the branches.

        Args:
            x: [b, n, d].
            cond: condition [b, cond_dim], or ready-made vectors [b, k, d] in branch order (`modulation(cond)` gives them).
            layout: made once per model call.
            context: tokens [b, m, d_c] for the branches that take context; or what `project_context` returned; or a (keys, values)
                pair where one branch takes context.
            mask: bool, True = attend, for every token mixer; or a list with one entry per branch.
            cache: what `new_cache` returned.
            width: nested width, for the channel mixers.

        Returns:
            [b, n, d].

        Raises:
            ValueError: for an argument that no branch, or not every branch concerned, can honour.
        """
        check_shape(x, "Block: x", "b n d", d=self.dim)
        mods = self._mods(cond)
        contexts, masks = self._contexts(context), self._masks(mask)
        caches = [None] * len(mods) if cache is None else list(self._per_branch(cache, "cache"))
        widths = self._widths(width)
        for i, branch in enumerate(self.branches):
            x = branch(x, mod=mods[i], layout=layout, context=contexts[i], mask=masks[i], cache=caches[i], width=widths[i])
        return x

    def new_cache(self, batch: int, max_len: int, *, device: torch.device | str, dtype: torch.dtype) -> list[Cache | None]:
        """Return one empty cache, or None, per branch.

        Raises:
            ValueError: if a branch cannot work chunk by chunk.
        """
        mixers = [branch.f for branch in self._branches()]
        for f in mixers:
            if isinstance(f, ChannelMixer) and not f.config.caps.cache:
                raise refusal(f.config, "cache")
        return [f.new_cache(batch, max_len, device=device, dtype=dtype) if isinstance(f, TokenMixer) else None for f in mixers]

    def project_context(self, context: Tensor, cond: Tensor | None = None) -> list[tuple[Tensor, Tensor] | None]:
        """Return (keys, values) of the context tokens [b, m, d_c] per branch (None where it takes none), for `forward`."""
        mods = self._mods(cond)
        taking = [branch.takes_context for branch in self._branches()]
        if not any(taking):
            raise self._no_context()
        pairs = zip(self._branches(), mods, strict=True)
        return [branch.project_context(context, mod) if branch.takes_context else None for branch, mod in pairs]

    def _branches(self) -> list[Branch]:
        """Return the branches with their type."""
        return [branch for branch in self.branches if isinstance(branch, Branch)]

    def _mods(self, cond: Tensor | None) -> list[Tensor | None]:
        """Return the vectors of each branch, None where it has none."""
        total = sum(self.counts)
        if total == 0:
            if cond is not None:
                raise ValueError("Block: no branch is modulated, so cond has no use; build the stack with modulated=True or leave it out.")
            return [None] * len(self.counts)
        if cond is None:
            raise ValueError(f"Block: cond is missing; give [b, cond_dim] or ready-made vectors [b, {total}, {self.dim}].")
        if cond.ndim == 2:
            if self.modulation is None:
                raise ValueError(f"Block: has no Linear for cond; give vectors [b, {total}, {self.dim}], got {list(cond.shape)}.")
            cond = self.modulation(cond)
        check_shape(cond, "Block: cond", "b k d", k=total, d=self.dim)
        return [part if count else None for part, count in zip(cond.split(self.counts, dim=1), self.counts, strict=True)]

    def _contexts(self, context: Context | Sequence[Context | None] | None) -> Sequence[Context | None]:
        """Return the context of each branch."""
        taking = [branch.takes_context for branch in self._branches()]
        if context is None:
            return [None] * len(taking)
        if isinstance(context, list):
            return self._per_branch(context, "context")
        if not any(taking):
            raise self._no_context()
        if isinstance(context, tuple) and sum(taking) > 1:
            raise ValueError("Block: several branches take context; give the list that project_context returned.")
        return [context if takes else None for takes in taking]  # type: ignore[misc]

    def _masks(self, mask: Tensor | Sequence[Tensor | None] | None) -> Sequence[Tensor | None]:
        """Return the mask of each branch; one that cannot honour it refuses by name."""
        mixers = [branch.f for branch in self._branches()]
        if not isinstance(mask, Tensor):
            return [None] * len(mixers) if mask is None else self._per_branch(mask, "mask")
        for f in mixers:
            if not f.config.caps.mask:
                raise refusal(f.config, "mask")
        if not any(isinstance(f, TokenMixer) for f in mixers):
            raise refusal(mixers[0].config, "mask")
        return [mask if isinstance(f, TokenMixer) else None for f in mixers]

    def _widths(self, width: float | None) -> list[float | None]:
        """Return the width of each branch."""
        mixers = [branch.f for branch in self._branches()]
        if width is not None and not any(isinstance(f, ChannelMixer) for f in mixers):
            raise refusal(mixers[0].config, "width")
        return [width if isinstance(f, ChannelMixer) else None for f in mixers]

    def _per_branch(self, values: Sequence[T], name: str) -> Sequence[T]:
        """Check that a list has one entry per branch."""
        if len(values) != len(self.counts):
            raise ValueError(f"Block: {name} must have one entry per branch ({len(self.counts)}), got {len(values)}.")
        return values

    def _no_context(self) -> ValueError:
        """Return the error for context that nobody takes."""
        able = sorted(config.offers["context"] for config in MIXERS.values() if "context" in config.offers)
        names = " + ".join(str(branch.f.config) for branch in self._branches())
        return ValueError(f"Block({names}): no branch takes context. Mixers that do: {', '.join(able)}.")
