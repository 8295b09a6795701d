"""Triangle meshes as sequences of quantised coordinates, and back.

A mesh is quantised to `bins` steps a side, brought into one canonical order, and written either face by face (9 coordinates each) or as
strips in which every further face costs one vertex: adjacent mesh tokenization (Chen et al. 2024, MeshAnything V2, arXiv 2408.02555).

- linear in the number of faces: `eval/benchmark.py mesh_tokens`
- what quantising merges, flattens and doubles is counted; illegal sequences raise, are repaired and counted, or read as released

Letters: v vertices, f faces, n tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from genkit.checks import choose

BINS = 128
BOS, EOS, PAD, SPECIALS = 0, 1, 2, 3
"""Ids of a model's special tokens; token t of this file is id t + SPECIALS."""
ON_ILLEGAL = ("raise", "repair", "official")
FIRST_TRIANGLE = (-0.1, 0.0, 0.1, -0.1, 0.1, 0.2, -0.3, 0.3, 0.2)  # what the released code finds in an empty sequence


@dataclass(frozen=True)
class CanonicalMesh:
    """A quantised mesh in canonical order.

    Args:
        vertices: [v, 3] int64 steps, all different and used, ascending by z, then y, then x.
        faces: [f, 3] int64, ascending inside, all different, ascending.
        wound: [f, 3] int64, the same faces with their corners in the order in which they were given; of double ones the first.
        merged: vertices that fell together.
        degenerate: faces that lost their area by that.
        duplicate: faces that were there already.
        unused: vertices without faces.
    """

    vertices: NDArray[np.int64]
    faces: NDArray[np.int64]
    wound: NDArray[np.int64]
    merged: int = 0
    degenerate: int = 0
    duplicate: int = 0
    unused: int = 0

    def positions(self, bins: int = BINS) -> NDArray[np.float64]:
        """Return vertex positions [v, 3] in [-0.5, 0.5)."""
        return dequantised(self.vertices, bins)


def quantised(positions: NDArray[np.float64], bins: int = BINS) -> NDArray[np.int64]:
    """Return the steps [v, 3] of positions in [-0.5, 0.5]."""
    return np.round((positions + 0.5) * bins - 0.5).clip(0, bins - 1).astype(np.int64)


def dequantised(steps: NDArray[Any], bins: int = BINS) -> NDArray[np.float64]:
    """Return the positions of steps: the low edge of each, as published."""
    return np.asarray(steps) / bins - 0.5


def canonical(steps: NDArray[np.int64], faces: NDArray[Any]) -> CanonicalMesh:
    """Return a quantised mesh [v, 3], [f, 3] in canonical order, without what is superfluous.

    Raises:
        ValueError: for faces that name vertices that are not there.
    """
    faces = np.asarray(faces, np.int64).reshape(-1, 3)
    if len(faces) and not 0 <= faces.min() <= faces.max() < len(steps):
        raise ValueError(f"faces name vertices {faces.min()} to {faces.max()} of {len(steps)}.")
    unique, inverse = np.unique(np.asarray(steps, np.int64).reshape(-1, 3)[:, ::-1], axis=0, return_inverse=True)
    given = inverse.reshape(-1)[faces]
    found = np.sort(given, axis=1)
    has_area = (found[:, 0] != found[:, 1]) & (found[:, 1] != found[:, 2])
    single, first = np.unique(found[has_area], axis=0, return_index=True)
    used, renumbered = np.unique(single, return_inverse=True)
    return CanonicalMesh(
        vertices=np.ascontiguousarray(unique[used, ::-1]),
        faces=renumbered.reshape(-1, 3),
        wound=np.searchsorted(used, given[has_area][first]),
        merged=len(steps) - len(unique),
        degenerate=int((~has_area).sum()),
        duplicate=int(has_area.sum()) - len(single),
        unused=len(unique) - len(used),
    )


def strips_of(faces: NDArray[np.int64]) -> list[list[int]]:
    """Return canonical faces [f, 3] as strips of vertices: after the first three, each vertex makes a face with the two before it.

    A strip starts at the first face not yet written and goes on with the lowest vertex that, with the last two, is such a face.
    """
    rows = faces.tolist()
    thirds: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for number, (i, j, k) in enumerate(rows):  # ascending, since the faces are
        thirds.setdefault((i, j), []).append((k, number))
        thirds.setdefault((i, k), []).append((j, number))
        thirds.setdefault((j, k), []).append((i, number))
    visited, strips = [False] * len(rows), []
    for number, row in enumerate(rows):
        if visited[number]:
            continue
        visited[number] = True
        strip = list(row)
        while True:
            a, b = strip[-2:]
            edge = (a, b) if a < b else (b, a)
            left = [item for item in thirds[edge] if not visited[item[1]]]
            thirds[edge] = left
            if not left:
                break
            vertex, face = left[0]
            visited[face] = True
            strip.append(vertex)
        strips.append(strip)
    return strips


@dataclass(frozen=True)
class DecodedMesh:
    """Triangles that a sequence stands for.

    Args:
        triangles: [f, 3, 3] int64 steps, in the order of the sequence.
        dropped: tokens that made no face.
        problem: what was wrong with the sequence; "" if nothing.
    """

    triangles: NDArray[np.int64]
    dropped: int = 0
    problem: str = ""


class TokenLayout:
    """How faces become tokens.

    Args:
        bins: steps a side.

    Attributes:
        name: of the layout.
        num_tokens: different tokens, without a model's special ones.
        num_slots: different places that `slots` tells apart.
    """

    name: str
    num_slots: int

    def __init__(self, bins: int = BINS) -> None:
        if bins < 2:
            raise ValueError(f"bins must be at least 2, got {bins}.")
        self.bins = bins

    @property
    def num_tokens(self) -> int:
        """Different tokens, without a model's special ones."""
        raise NotImplementedError

    def encode(self, mesh: CanonicalMesh) -> NDArray[np.int64]:
        """Return the tokens [n] of a mesh."""
        raise NotImplementedError

    def decode(self, tokens: NDArray[Any] | Sequence[int], on_illegal: str = "raise") -> DecodedMesh:
        """Return the triangles of tokens [n]; a negative token ends them.

        Args:
            tokens: without special ones.
            on_illegal: "raise"; "repair": leave out the pieces that are no faces and count them; "official": as the released code reads it.

        Raises:
            ValueError: for tokens that do not exist, or an illegal sequence.
        """
        raise NotImplementedError

    def slots(self, ids: Tensor) -> Tensor:
        """Return the place of each id in its face, strip or vertex, for ids [b, n] of a model: [b, n] int64."""
        raise NotImplementedError

    def _checked(self, tokens: NDArray[Any] | Sequence[int]) -> NDArray[np.int64]:
        """Return tokens up to the first negative one."""
        array = np.asarray(tokens, np.int64).reshape(-1)
        ends = np.flatnonzero(array < 0)
        array = array[: ends[0]] if len(ends) else array
        if len(array) and array.max() >= self.num_tokens:
            raise ValueError(f"tokens of layout {self.name!r} lie in 0..{self.num_tokens - 1}, got {array.max()}.")
        return array


class AdjacentTokens(TokenLayout):
    """Strips of vertices (x, y, z), a break between them: MeshAnything V2.

    Example:
        >>> layout, square = AdjacentTokens(), np.array([[0, 0, 0], [9, 0, 0], [0, 9, 0], [9, 9, 0]])
        >>> tokens = layout.encode(canonical(square, np.array([[0, 1, 2], [1, 2, 3]])))
        >>> len(tokens), len(layout.decode(tokens).triangles)
        (12, 2)
    """

    name = "adjacent"
    num_slots = 10

    @property
    def num_tokens(self) -> int:
        """The steps and the break."""
        return self.bins + 1

    @property
    def break_token(self) -> int:
        """The token between strips."""
        return self.bins

    def encode(self, mesh: CanonicalMesh) -> NDArray[np.int64]:
        """Return the tokens [n] of a mesh."""
        strips = strips_of(mesh.faces)
        order = [vertex for strip in strips for vertex in (*strip, -1)][:-1]  # -1 is the break
        coordinates = np.concatenate([mesh.vertices, [[self.break_token, -1, -1]]])[order].reshape(-1)
        return coordinates[coordinates >= 0]

    def decode(self, tokens: NDArray[Any] | Sequence[int], on_illegal: str = "raise") -> DecodedMesh:
        """Return the triangles of tokens [n]; see `TokenLayout.decode`."""
        choose(on_illegal, ON_ILLEGAL, "on_illegal")
        array = self._checked(tokens)
        breaks = np.flatnonzero(array == self.break_token)
        starts, ends = np.r_[0, breaks + 1], np.r_[breaks, len(array)]
        lengths = ends - starts
        is_short, has_rest = lengths < 9, lengths % 3 != 0
        problem = ""
        if (wrong := np.flatnonzero(is_short | has_rest)).size:
            first = int(wrong[0])
            what = "stops inside a vertex" if has_rest[first] else "has fewer than 3 vertices"
            problem = f"{len(wrong)} of {len(lengths)} strips are no strips; number {first + 1}, at token {starts[first]}, {what}"
            if on_illegal == "raise":
                raise ValueError(f"illegal sequence: {problem}; on_illegal='repair' leaves such pieces out and counts them.")
        if on_illegal == "official":
            rows = released_triangles(array, self.bins)
            whole = rows[np.isfinite(rows).all(axis=(1, 2))]
            read = lengths[: int(wrong[0]) + 1] if wrong.size else lengths
            used = np.where(read < 9, 0, read - read % 3).sum()
            return DecodedMesh(np.round((whole + 0.5) * self.bins).astype(np.int64), int(lengths.sum() - used), problem)
        kept = np.where(is_short, 0, lengths // 3)
        index = _window_index(starts, kept)
        triangles = array[index].reshape(-1, 3, 3)
        return DecodedMesh(triangles, int((lengths - 3 * kept).sum()), problem)

    def slots(self, ids: Tensor) -> Tensor:
        """Return 0, 1, 2 for special ids, 3 for a break, 4-6 for coordinates of a strip's first three vertices, 7-9 for later ones."""
        is_coordinate = (ids >= SPECIALS) & (ids < SPECIALS + self.bins)
        place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        last = torch.where(is_coordinate, -1, place).cummax(dim=1).values
        count = place - last - 1
        coordinate = torch.where(count < 9, 4, 7) + count % 3
        return torch.where(is_coordinate, coordinate, torch.where(ids < SPECIALS, ids, 3))


class FaceTokens(TokenLayout):
    """Nine tokens a face: coordinates (three vertices of x, y, z), or residual codes of three vertices.

    Args:
        bins: steps a side.
        num_codes: codes of a codebook that stand in place of coordinates; None for coordinates.
    """

    name = "faces"
    num_slots = 12

    def __init__(self, bins: int = BINS, num_codes: int | None = None) -> None:
        super().__init__(bins)
        self.num_codes = num_codes

    @property
    def num_tokens(self) -> int:
        """The steps, or the codes."""
        return self.bins if self.num_codes is None else self.num_codes

    def encode(self, mesh: CanonicalMesh) -> NDArray[np.int64]:
        """Return the tokens [9 f] of a mesh.

        Raises:
            ValueError: if the tokens are codes, which a mesh VAE makes.
        """
        if self.num_codes is not None:
            raise ValueError("these tokens are codes; the encoder of a mesh VAE makes them.")
        return mesh.vertices[mesh.faces].reshape(-1)

    def decode(self, tokens: NDArray[Any] | Sequence[int], on_illegal: str = "raise") -> DecodedMesh:
        """Return the triangles of tokens [9 f]; see `TokenLayout.decode`. The released code, too, leaves a rest out."""
        choose(on_illegal, ON_ILLEGAL, "on_illegal")
        array = self._checked(tokens)
        rest = len(array) % 9
        problem = f"{len(array)} tokens are no whole number of faces (9 each)" if rest else "" if len(array) else "there is no face"
        if problem and on_illegal == "raise":
            raise ValueError(f"illegal sequence: {problem}; on_illegal='repair' leaves the rest out and counts it.")
        return DecodedMesh(array[: len(array) - rest].reshape(-1, 3, 3), rest, problem)

    def slots(self, ids: Tensor) -> Tensor:
        """Return 0, 1, 2 for special ids, 3-11 for the nine tokens of a face; counted from the id after the first, which is bos."""
        place = torch.arange(-1, ids.shape[1] - 1, device=ids.device).expand_as(ids)
        return torch.where(ids < SPECIALS, ids, place % 9 + SPECIALS)


LAYOUTS: dict[str, type[TokenLayout]] = {"adjacent": AdjacentTokens, "faces": FaceTokens}


def _window_index(starts: NDArray[np.int64], vertices: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the nine token places [f, 9] of every face of strips that start at `starts` and have so many whole vertices."""
    counts = (vertices - 2).clip(0)
    strip = np.repeat(np.arange(len(starts)), counts)
    place = np.arange(len(strip)) - np.repeat(np.cumsum(counts) - counts, counts)
    return (starts[strip] + 3 * place)[:, None] + np.arange(9)


def released_triangles(tokens: NDArray[Any], bins: int = BINS) -> NDArray[np.float32]:
    """Return what the released code of V2 makes of tokens [n]: triangles [f, 3, 3], the last perhaps half written (NaN).

    Defects: whatever follows the first illegal break is lost, and an empty sequence leaves one triangle that nobody asked for.
    """
    array = np.asarray(tokens, np.int64)
    ends = np.flatnonzero(array < 0)
    array = array[: ends[0]] if len(ends) else array
    rows: list[NDArray[np.float32]] = []
    for strip in np.split(array, np.flatnonzero(array == bins)):
        coordinates = dequantised(strip[strip != bins], bins).astype(np.float32)
        whole, count = len(coordinates) // 3, len(coordinates)
        if whole >= 3:
            rows += [coordinates[3 * i : 3 * i + 9] for i in range(whole - 2)]
            begun = np.concatenate([coordinates[3 * whole - 6 : 3 * whole], coordinates[3 * whole :]])
        else:
            begun = coordinates
        if count < 9 or count % 3:
            base = np.array(FIRST_TRIANGLE, np.float32) if not rows else np.full(9, np.nan, np.float32)
            if len(begun) or not rows:
                rows.append(np.concatenate([begun, base[len(begun) :]]))
            break
    return np.stack(rows).reshape(-1, 3, 3) if rows else np.zeros((0, 3, 3), np.float32)
