"""Mixers of genkit in transformers of diffusers: as attention processors, filled with the projections that are there.

A processor replaces a layer's self-attention by a mixer of the same width whose projections start as the layer's own; with `attention` the
result is the same, with another mixer the network has to be trained on. What the mixer learns is part of the model's state dict.

Letters: b batch, n tokens, d width, h w rows and columns of the tokens' grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from genkit.blocks.caps import TokenMixer
from genkit.blocks.layout import Layout
from genkit.blocks.stack import parse

NAMES = ("attn1", "attn", "self_attn")
"""How diffusers names self-attention."""


class MixerProcessor(nn.Module):
    """An attention processor of diffusers that is a mixer.

    Args:
        mixer: of the layer's width.
        grid: (h, w) of the tokens; a square if None, for mixers that need one.
    """

    def __init__(self, mixer: TokenMixer, grid: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.mixer, self.grid = mixer, grid

    def forward(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Mix the tokens of a layer.

        Args:
            attn: the layer; its projections are not used.
            hidden_states: [b, n, d].
            encoder_hidden_states: must be None or the tokens themselves.
            attention_mask: bool [b, n], True = attend, or None; only for mixers that take one.

        Returns:
            [b, n, d].

        Raises:
            ValueError: for other tokens as keys, additive masks, or a number of tokens that is no square where a grid is needed.
        """
        if encoder_hidden_states is not None and encoder_hidden_states is not hidden_states:
            raise ValueError(f"{self.mixer.config}: this layer attends to other tokens; leave its processor as it is.")
        if attention_mask is not None and attention_mask.dtype != torch.bool:
            raise ValueError(f"{self.mixer.config}: attention_mask must be bool (True = attend), got {attention_mask.dtype}.")
        grid = self.grid
        if grid is None and self.mixer.config.caps.grid:
            side = math.isqrt(hidden_states.shape[1])
            if side * side != hidden_states.shape[1]:
                raise ValueError(f"{self.mixer.config}: {hidden_states.shape[1]} tokens are no square; give grid=(rows, columns).")
            grid = (side, side)
        return self.mixer(hidden_states, layout=Layout(grid=grid), mask=attention_mask)


@torch.no_grad()
def filled(mixer: TokenMixer, attn: Any) -> TokenMixer:
    """Give a mixer the projections of a diffusers attention layer, as far as it has maps of their names and shapes, and return it."""
    parts = {"q": attn.to_q, "k": attn.to_k, "v": attn.to_v, "proj": attn.to_out[0]}
    owner: Any = getattr(mixer, "attention", mixer)
    for name, source in parts.items():
        target = getattr(owner, name, None)
        if isinstance(target, nn.Linear) and target.weight.shape == source.weight.shape:
            target.weight.copy_(source.weight)
            if target.bias is not None:
                target.bias.copy_(torch.zeros_like(target.bias) if source.bias is None else source.bias)
    kv = getattr(owner, "kv", None)
    if (
        isinstance(kv, nn.Linear)
        and kv.weight.shape[0] == 2 * attn.to_k.weight.shape[0]
        and kv.weight.shape[1] == attn.to_k.weight.shape[1]
    ):
        kv.weight.copy_(torch.cat([attn.to_k.weight, attn.to_v.weight]))
        if kv.bias is not None:
            biases = [torch.zeros(len(part.weight)) if part.bias is None else part.bias for part in (attn.to_k, attn.to_v)]
            kv.bias.copy_(torch.cat([bias.to(kv.bias) for bias in biases]))
    return mixer


def use_mixer(model: Any, text: str, *, grid: tuple[int, int] | None = None, chosen: Callable[[str], bool] | None = None) -> list[str]:
    """Put a mixer in place of the self-attention of a diffusers transformer.

    Args:
        model: has `attn_processors` and `set_attn_processor`, as PixArt, SD3 and Flux transformers of diffusers have.
        text: one mixer, as in a stack string: "linear", "window(size=8)".
        grid: (h, w) of the tokens; a square if None, for mixers that need one.
        chosen: tells by a layer's name whether it is to be replaced; all of self-attention if None.

    Returns:
        Names of the replaced layers.

    Raises:
        TypeError: for a model without processors. ValueError: for a text that is not one token mixer, or if no layer is chosen.
    """
    if not hasattr(model, "set_attn_processor"):
        raise TypeError(f"use_mixer needs a diffusers model with attention processors, got {type(model).__name__}.")
    stack = parse(text)
    if len(stack) != 1 or len(stack[0]) != 1:
        raise ValueError(f"use_mixer takes one mixer, got {text!r}.")
    (config,) = stack[0]
    processors = dict(model.attn_processors)
    names = [name.removesuffix(".processor") for name in processors]
    wanted = [name for name in names if _is_self_attention(model.get_submodule(name), name) and (chosen is None or chosen(name))]
    if not wanted:
        raise ValueError(f"use_mixer: no layer of self-attention is chosen; {type(model).__name__} has {', '.join(names[:6])}, ...")
    for name in wanted:
        attn = model.get_submodule(name)
        mixer = config.build(attn.to_q.in_features, heads=attn.heads)
        if not isinstance(mixer, TokenMixer):
            raise ValueError(f"use_mixer takes a token mixer, got {text!r}.")
        mixer = filled(mixer.to(attn.to_q.weight), attn)
        processors[f"{name}.processor"] = MixerProcessor(mixer.train(attn.training), grid)
    model.set_attn_processor(processors)
    return wanted


def _is_self_attention(attn: Any, name: str) -> bool:
    """Tell whether a layer attends to its own tokens, and to nothing beside them."""
    joint = getattr(attn, "added_kv_proj_dim", None) is not None
    return not getattr(attn, "is_cross_attention", False) and not joint and name.rpartition(".")[2] in NAMES
