"""The stack string: which mixers a model's blocks are made of, written as an expression.

`name` or `name(option=literal)` is a mixer, `a + b` are the branches of one block, `* 6` repeats a block or a parenthesised list,
`,` starts the next block: "(attention(heads=6) + mlp) * 6, mlp". A preset, `name(depth)`, is a list of so many blocks. The text is read
with `ast` and never evaluated.
"""

from __future__ import annotations

import ast
import dataclasses
from itertools import groupby

from torch import nn

from genkit.blocks import (  # noqa: F401  (their import enters the mixers in MIXERS)
    attention,
    axial,
    axial_kernel,
    cga,
    conv,
    conv_mlp,
    graph,
    group,
    latent,
    linear,
    lmu,
    memory,
    mlp,
    modulation_mixer,
    reduced,
    retention,
    shsa,
    window,
)
from genkit.blocks.branch import Block, Branch
from genkit.blocks.caps import MIXERS, Caps, MixerConfig
from genkit.checks import unknown

BlockConfig = tuple[MixerConfig, ...]

PRESETS = {
    "dit": "attention + mlp",
    "dit_fast256": "shsa + mlp, shsa + mlp, attention + mlp",
    "dit_hires": "window + mlp, window(shift=4) + mlp, window + mlp, attention + mlp",
    "ar_state": "(retention + mlp) * 3, attention(causal=True) + mlp",
    "video": "axial('f') + axial + mlp",
    "tok_enc": "modulation, modulation(e=4)",
    "points": "group(order='morton', window=(0.01, 0.01)) + mlp, latent + mlp",
}
"""Blocks that follow each other again and again, up to the depth: for generators of pictures, of 16 x 16 tokens and of many; for one token
after the other; video; a tokenizer's towers; points in a box of about [-1, 1]. Saved models hold these names: they stay as they are."""


class Stack(tuple[BlockConfig, ...]):
    """Blocks, each a tuple of mixer configs; `str()` gives the canonical string, which parses back to the same stack."""

    def __str__(self) -> str:
        parts = []
        for block, run in groupby(self):
            text, count = " + ".join(map(str, block)), len(list(run))
            if count > 1:
                text = f"({text}) * {count}" if len(block) > 1 else f"{text} * {count}"
            parts.append(text)
        return ", ".join(parts)


def parse(text: str) -> Stack:
    """Read a stack string.

    Raises:
        ValueError: with the column, what was expected and, for names, the nearest and the list.

    Example:
        >>> str(parse("(attention(causal=True) + mlp(4.0)) * 2"))
        '(attention(causal=True) + mlp) * 2'
    """
    flat = " ".join(text.split("\n")) if isinstance(text, str) else text
    if not isinstance(flat, str) or not flat.strip():
        raise ValueError(f"a stack must be a string such as '(attention + mlp) * 12', got {text!r}.")
    return Stack(_Reader(flat).read())


def build(
    stack: str | Stack,
    dim: int,
    *,
    heads: int | None = None,
    norm: str = "ln",
    eps: float = 1e-5,
    residual: str = "pre",
    modulated: bool | str = False,
    cond_dim: int | None = None,
    context_dim: int | None = None,
    context_norm: str = "none",
    modulate_context: bool = False,
    layer_scale: float | None = None,
    dropout: float = 0.0,
    needs: Caps | None = None,
) -> nn.ModuleList:
    """Build the blocks of a stack; everything but the mixers is the model's choice and given here.

    Args:
        stack: string or parsed stack.
        dim: d.
        heads: default number of heads.
        norm: kind of norm in front of (or behind) each branch, see `build_norm`.
        eps: of the norms.
        residual: "pre", "post", "sandwich" or "none", see `Branch`.
        modulated: True gives each block its own modulation Linear, "given" expects ready-made vectors.
        cond_dim: width of the condition; d if None.
        context_dim: width of context tokens; d if None.
        context_norm: norm of the context in the branches that take it.
        modulate_context: those branches have 5 vectors, the context being modulated too.
        layer_scale: start value of a learned factor per channel on each branch; none if None.
        dropout: of each branch's result, in training.
        needs: what the model asks of its mixers; checked before anything is built.

    Returns:
        ModuleList of `Block`.

    Raises:
        ValueError: for a bad string, options that do not fit `dim`, or a mixer without a needed capability.
    """
    blocks = parse(stack) if isinstance(stack, str) else Stack(stack)
    if modulated not in (True, False, "given"):
        raise ValueError(f"modulated must be True, False or 'given', got {modulated!r}.")
    if needs is not None:
        check_needs(blocks, needs)
    own_cond = (dim if cond_dim is None else cond_dim) if modulated is True else None
    built = []
    for block in blocks:
        branches = []
        for config in block:
            takes_context = config.caps.context
            branches.append(
                Branch(
                    config.build(dim, heads=heads, context_dim=context_dim),
                    dim,
                    norm,
                    eps=eps,
                    residual=residual,
                    modulated=bool(modulated),
                    context_norm=context_norm if takes_context else "none",
                    modulate_context=modulate_context and takes_context,
                    context_dim=context_dim,
                    layer_scale=layer_scale,
                    dropout=dropout,
                )
            )
        built.append(Block(branches, dim, cond_dim=own_cond))
    return nn.ModuleList(built)


def check_needs(stack: Stack, needs: Caps) -> None:
    """Check that every mixer (for `context`: one of each block) has what a model needs.

    Raises:
        ValueError: naming the first block and mixer that fall short, and what is missing.
    """
    for number, block in enumerate(stack, start=1):
        for config in block:
            missing = [name for name in config.caps.missing(needs) if name != "context"]
            if missing:
                raise ValueError(f"stack block {number}: {config} lacks {', '.join(missing)}, which this model needs.{_able(missing)}")
        if needs.context and not any(config.caps.context for config in block):
            raise ValueError(f"stack block {number}: no branch takes context, which this model needs.{_able(['context'])}")


def _able(missing: list[str]) -> str:
    """Name the mixers that offer what is missing."""
    able = sorted({mixer.offers[name] for mixer in MIXERS.values() for name in missing if name in mixer.offers})
    return f" Try {', '.join(able)}." if able else ""


def _preset(node: ast.expr) -> str:
    """Return the preset that an expression names, or nothing."""
    function = node.func if isinstance(node, ast.Call) else node
    return function.id if isinstance(function, ast.Name) and function.id in PRESETS else ""


class _Reader:
    """Turns one stack string into blocks."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.indent = len(text) - len(text.lstrip())

    def error(self, column: int, message: str) -> ValueError:
        return ValueError(f"stack {self.text!r}, column {column + 1}: {message}")

    def at(self, node: ast.AST) -> int:
        return getattr(node, "col_offset", 0) + self.indent

    def read(self) -> list[BlockConfig]:
        try:
            tree = ast.parse(self.text.strip(), mode="eval").body
        except SyntaxError as wrong:
            raise self.error((wrong.offset or 1) - 1 + self.indent, f"not an expression ({wrong.msg}).") from None
        return self.blocks(tree)

    def blocks(self, node: ast.expr) -> list[BlockConfig]:
        """A list of blocks: `a, b`, `x * 3`, or one block."""
        if isinstance(node, ast.Tuple):
            if not node.elts:
                raise self.error(self.at(node), "an empty list of blocks.")
            return [block for part in node.elts for block in self.blocks(part)]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            count = self.count(node.right)
            return self.blocks(node.left) * count
        if _preset(node):
            return self.preset(node)
        return [self.block(node)]

    def preset(self, node: ast.expr) -> list[BlockConfig]:
        """The blocks of `name(depth)`."""
        name, given = _preset(node), list[tuple[str | None, ast.expr]]()
        if isinstance(node, ast.Call):
            given = [*(("depth", value) for value in node.args), *((keyword.arg, keyword.value) for keyword in node.keywords)]
        if [key for key, _ in given] != ["depth"]:
            raise self.error(self.at(node), f"{name} is a preset; write how many blocks, as in {name}(12).")
        pattern = parse(PRESETS[name])
        return [pattern[i % len(pattern)] for i in range(self.count(given[0][1]))]

    def count(self, node: ast.expr) -> int:
        if isinstance(node, ast.Constant) and type(node.value) is int and node.value > 0:
            return node.value
        raise self.error(
            self.at(node),
            f"blocks are counted as in `(a + b) * 6` or `dit(6)`; expected a positive whole number, got {ast.unparse(node)!r}.",
        )

    def block(self, node: ast.expr) -> BlockConfig:
        """One block: mixers joined by `+`."""
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self.block(node.left) + self.block(node.right)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            raise self.error(self.at(node), "`*` binds tighter than `+`; to repeat the whole block write `(a + b) * 2`.")
        if isinstance(node, ast.Tuple) or _preset(node):
            raise self.error(self.at(node), "`+` joins the branches of one block and cannot join lists of blocks; use `,`.")
        return (self.mixer(node),)

    def mixer(self, node: ast.expr) -> MixerConfig:
        """A mixer: `name` or `name(options)`."""
        function = node.func if isinstance(node, ast.Call) else node
        if not isinstance(function, ast.Name):
            raise self.error(self.at(node), f"expected a block name, `name(options)`, `+`, `*` or `,`, got {ast.unparse(node)!r}.")
        if function.id not in MIXERS:
            raise self.error(self.at(function), unknown(function.id, [*MIXERS, *PRESETS], "block"))
        config = MIXERS[function.id]
        try:
            return config(**self.options(config, node) if isinstance(node, ast.Call) else {})
        except ValueError as wrong:
            if str(wrong).startswith("stack "):
                raise
            raise self.error(self.at(node), str(wrong)) from None

    def options(self, config: type[MixerConfig], call: ast.Call) -> dict[str, object]:
        """The options of a call, as literals."""
        known = [f.name for f in dataclasses.fields(config)]  # type: ignore[arg-type]
        if len(call.args) > 1:
            raise self.error(self.at(call.args[1]), f"only the first option of {config.name} ({known[0]}) may be given without a name.")
        options = dict(zip(known, map(self.literal, call.args), strict=False))
        for keyword in call.keywords:
            if keyword.arg is None or keyword.arg not in known:
                raise self.error(self.at(keyword), unknown(keyword.arg, known, f"option of {config.name}:"))
            if keyword.arg in options:
                raise self.error(self.at(keyword), f"option {keyword.arg} of {config.name} is given twice.")
            options[keyword.arg] = self.literal(keyword.value)
        return options

    def literal(self, node: ast.expr) -> object:
        try:
            value = ast.literal_eval(node)
        except ValueError:
            raise self.error(self.at(node), f"options are literals (number, 'text', True, None), got {ast.unparse(node)!r}.") from None
        return tuple(value) if isinstance(value, list) else value
