"""Mesh generation: decoding steps against the released order of computation, and mesh tokens against the released way to make them."""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from _timing import machine, report, timed
from torch import Tensor
from torch.nn import functional as F

from genkit.convert.meshanything import to_official
from genkit.data.mesh_augment import centred_box
from genkit.generators.mesh_stepper import MeshStepper
from genkit.generators.mesh_transformer import OFFSET, MeshTransformer
from genkit.tokenizers.mesh_tokens import SPECIALS, AdjacentTokens, canonical, quantised


class ConcatenatingOPT:
    """One decoding step as released: three projections, caches that grow by concatenation.

    Args:
        state: official state dict.
        heads: of each attention.
        depth: blocks.
    """

    def __init__(self, state: dict[str, Tensor], heads: int, depth: int) -> None:
        self.state, self.heads, self.depth, self.root = state, heads, depth, "transformer.model.decoder"

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    @torch.no_grad()
    def __call__(self, ids: Tensor, slot: Tensor, place: int, past: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Return logits [b, k] of ids [b, 1]; `past` is replaced by longer tensors."""
        table, root = self.state, self.root
        x = F.embedding(ids, table["transformer.lm_head.weight"]) + table[f"{root}.token_embed_positions.weight"][slot]
        x = x + table[f"{root}.cond_embed.weight"][1] + table[f"{root}.embed_positions.weight"][place + OFFSET]
        for i in range(self.depth):
            name = f"{root}.layers.{i}"
            q, k, v = (
                self.linear(x, f"{name}.self_attn.{part}_proj").unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in ("q", "k", "v")
            )
            past[i] = (torch.cat([past[i][0], k], dim=2), torch.cat([past[i][1], v], dim=2))
            mixed = F.scaled_dot_product_attention(q, *past[i]).transpose(1, 2).flatten(2)
            x = self.norm(x + self.linear(mixed, f"{name}.self_attn.out_proj"), f"{name}.self_attn_layer_norm")
            inner = F.relu(self.linear(x, f"{name}.fc1"))
            x = self.norm(x + self.linear(inner, f"{name}.fc2"), f"{name}.final_layer_norm")
        return F.linear(x, table["transformer.lm_head.weight"])[:, -1]


def mesh(
    contexts: list[int] | None = None,
    tokens: int = 8,
    batch: int = 1,
    depth: int = 24,
    device: str = "cpu",
    dtype: Literal["float32", "bfloat16"] = "float32",
    compiled: bool = False,
    threads: int = 0,
    repeats: int = 3,
) -> None:
    """Time greedy decoding at several context lengths, at the published size of V2 with random weights.

    Args:
        contexts: places that the caches hold when the clock starts; 300, 1500, 3000 and 4500 if None.
        tokens: decoded from there in each run.
        batch: sequences at once.
        depth: blocks.
        device: cpu, cuda or mps.
        dtype: of both ways.
        compiled: also time our step with torch.compile.
        threads: CPU threads; 0 leaves PyTorch's choice.
        repeats: timed runs of each way.
    """
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = MeshTransformer(depth=depth).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" not in name:  # start values are too small to tell ids apart
            parameter.mul_(2)
    model = model.to(device, getattr(torch, dtype))
    stepper = MeshStepper(model)
    plain = ConcatenatingOPT(to_official(model), model.config["heads"], depth)
    print(f"MeshAnything V2, {depth} blocks x {model.config['width']}, batch {batch}, {dtype}; {machine(device)}")
    for context in contexts or [300, 1500, 3000, 4500]:
        shape = (batch, model.config["heads"], context, 64)
        like = {"device": device, "dtype": model.dtype}
        start = [(torch.randn(shape, **like), torch.randn(shape, **like)) for _ in range(depth)]
        cache = model.new_cache(batch, context + tokens)
        for block, (k, v) in zip(cache, start, strict=True):
            own: Any = block[0]
            own.k[:, :, :context], own.v[:, :, :context] = k, v
        first = torch.full((batch, 1), SPECIALS, device=device)
        ways = {"released order": lambda start=start, context=context, first=first: _plain_run(plain, first, start, context, tokens)}
        ways["genkit"] = lambda cache=cache, context=context, first=first: _our_run(stepper, first, cache, context, tokens)
        if compiled:
            step = torch.compile(stepper)
            ways["genkit, compiled"] = lambda s=step, cache=cache, context=context, first=first: _our_run(s, first, cache, context, tokens)
        print(f"context {context}:")
        report(timed(ways, repeats, device), batch * tokens, "tokens")


def _slot(t: int, like: Tensor) -> Tensor:
    """Return the slot of the t-th coordinate of a long strip, for every row."""
    return torch.full_like(like, 7 + t % 3)


def _plain_run(plain: ConcatenatingOPT, ids: Tensor, start: list[tuple[Tensor, Tensor]], context: int, tokens: int) -> Tensor:
    past, found = list(start), []
    for t in range(tokens):
        ids = plain(ids, _slot(t, ids), context + t, past).argmax(-1, keepdim=True)
        found.append(ids)
    return torch.cat(found, dim=1)


@torch.no_grad()
def _our_run(step: Callable[..., Tensor], ids: Tensor, cache: Any, context: int, tokens: int) -> Tensor:
    for block in cache:
        block[0].length = context
    found = []
    for t in range(tokens):
        ids = step(ids, _slot(t, ids), context + t, cache).argmax(-1, keepdim=True)
        found.append(ids)
    return torch.cat(found, dim=1)


def mesh_tokens(subdivisions: int = 3, threads: int = 1, repeats: int = 5) -> None:
    """Time adjacent mesh tokenization against the released way, which searches all unvisited faces for every candidate.

    Args:
        subdivisions: of the icosphere: 20 * 4^n faces.
        threads: CPU threads.
        repeats: timed runs of each way.
    """
    import trimesh

    torch.set_num_threads(threads)
    ball = trimesh.creation.icosphere(subdivisions)
    mesh = canonical(quantised(centred_box(ball.vertices)), ball.faces)
    layout = AdjacentTokens()
    tokens = layout.encode(mesh)
    ways = {"released order": lambda: torch.from_numpy(_scanning_tokens(mesh)), "genkit": lambda: torch.from_numpy(layout.encode(mesh))}
    print(f"tokens of {len(mesh.faces)} faces; {machine('cpu')}")
    report(timed(ways, repeats, "cpu"), len(mesh.faces), "faces")
    print(f"triangles of {len(tokens)} tokens:")
    report(timed({"genkit": lambda: torch.from_numpy(layout.decode(tokens).triangles)}, repeats, "cpu"), len(mesh.faces), "faces")


def _scanning_tokens(mesh: Any) -> np.ndarray:
    """Return the tokens of a mesh, found by scanning the list of unvisited faces."""
    left = [tuple(face) for face in mesh.faces.tolist()]
    neighbours: dict[int, set[int]] = {}
    for face in left:
        for vertex in face:
            neighbours.setdefault(vertex, set()).update(face)
    order: list[int] = []
    while left:
        order += [-1] * bool(order) + list(left.pop(0))
        found = True
        while found and left:
            a, b = order[-2:]
            found = False
            for c in sorted((neighbours[a] & neighbours[b]) - {a, b}):
                face = tuple(sorted((a, b, c)))
                index = next((i for i, other in enumerate(left) if other == face), None)
                if index is not None:
                    left.pop(index)
                    order.append(c)
                    found = True
                    break
    table = np.concatenate([mesh.vertices, [[128, -1, -1]]])
    coordinates = table[order].reshape(-1)
    return coordinates[coordinates >= 0]
