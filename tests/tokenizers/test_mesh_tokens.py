"""Mesh tokens: canonical order, both layouts, their round trips, illegal sequences, and the grammar."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
import trimesh
from numpy.typing import NDArray

from genkit.data.mesh_augment import centred_box
from genkit.tokenizers.mesh_grammar import MeshGrammar, check_sequence
from genkit.tokenizers.mesh_tokens import (
    BOS,
    EOS,
    PAD,
    SPECIALS,
    AdjacentTokens,
    CanonicalMesh,
    FaceTokens,
    TokenLayout,
    canonical,
    dequantised,
    quantised,
    released_triangles,
    strips_of,
)  # fmt: skip

RANDOM = np.random.default_rng(0)


def soup(faces: int = 30, bins: int = 16) -> CanonicalMesh:
    """Random triangles: non-manifold edges, loose faces, everything."""
    return canonical(RANDOM.integers(0, bins, (18, 3)), RANDOM.integers(0, 18, (faces, 3)))


MESHES: dict[str, CanonicalMesh] = {
    name: canonical(quantised(centred_box(mesh.vertices)), mesh.faces)
    for name, mesh in {
        "box": trimesh.creation.box((1, 0.6, 0.4)), "ball": trimesh.creation.icosphere(2), "torus": trimesh.creation.torus(1, 0.4),
        "cone": trimesh.creation.cone(1, 2, sections=9),
    }.items()
} | {"soup": soup()}  # fmt: skip


def triangles_of(mesh: CanonicalMesh) -> set[tuple[tuple[int, ...], ...]]:
    return {tuple(sorted(tuple(vertex) for vertex in face)) for face in mesh.vertices[mesh.faces].tolist()}


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("layout", [AdjacentTokens(), FaceTokens()], ids=["adjacent", "faces"])
def test_decoding_gives_the_same_triangles(name: str, layout: TokenLayout) -> None:
    mesh = MESHES[name]
    found = layout.decode(layout.encode(mesh))
    assert len(found.triangles) == len(mesh.faces) and found.dropped == 0 and not found.problem
    again = canonical(found.triangles.reshape(-1, 3), np.arange(3 * len(found.triangles)))
    np.testing.assert_array_equal(again.vertices, mesh.vertices)
    np.testing.assert_array_equal(again.faces, mesh.faces)


@pytest.mark.parametrize("name", MESHES)
def test_strip_tokens_have_the_published_bounds(name: str) -> None:
    mesh = MESHES[name]
    tokens = AdjacentTokens().encode(mesh).tolist()
    assert 3 * len(mesh.faces) + 6 <= len(tokens) <= 10 * len(mesh.faces) - 1
    assert 128 not in (tokens[0], tokens[-1])
    assert all(pair != (128, 128) for pair in itertools.pairwise(tokens))


def test_tokens_do_not_depend_on_the_order_of_vertices_and_faces() -> None:
    mesh = trimesh.creation.icosphere(2)
    steps, faces = quantised(centred_box(mesh.vertices)), np.asarray(mesh.faces)
    order = RANDOM.permutation(len(steps))
    shuffled = np.argsort(order)[faces][RANDOM.permutation(len(faces))]
    shuffled = np.stack([np.roll(face, turn) for face, turn in zip(shuffled, RANDOM.integers(0, 3, len(faces)), strict=True)])
    for layout in (AdjacentTokens(), FaceTokens()):
        np.testing.assert_array_equal(layout.encode(canonical(steps, faces)), layout.encode(canonical(steps[order], shuffled)))


def test_canonical_counts_what_quantising_costs() -> None:
    steps = np.array([[0, 0, 0], [5, 0, 0], [5, 0, 0], [0, 5, 0], [9, 9, 9]])
    mesh = canonical(steps, np.array([[0, 1, 3], [3, 0, 2], [1, 2, 3]]))
    assert (mesh.merged, mesh.degenerate, mesh.duplicate, mesh.unused) == (1, 1, 1, 1)
    np.testing.assert_array_equal(mesh.vertices, [[0, 0, 0], [5, 0, 0], [0, 5, 0]])  # by z, then y, then x
    np.testing.assert_array_equal(mesh.faces, [[0, 1, 2]])
    with pytest.raises(ValueError, match="name vertices 0 to 7 of 5"):
        canonical(steps, np.array([[0, 1, 7]]))


def test_quantising_again_changes_nothing() -> None:
    steps = np.arange(128)[:, None].repeat(3, 1)
    np.testing.assert_array_equal(quantised(dequantised(steps) + 0.5 / 128), steps)


def test_a_box_needs_an_extent_and_finite_numbers() -> None:
    with pytest.raises(ValueError, match="no extent"):
        centred_box(np.ones((4, 3)))
    with pytest.raises(ValueError, match="finite"):
        centred_box(np.array([[np.nan, 0, 0]]))


def test_every_face_of_a_fan_around_one_edge_is_written_once() -> None:
    steps = np.concatenate([[[0, 0, 0], [1, 0, 0]], [[5, i, i] for i in range(1, 9)]])
    faces = canonical(steps, np.array([[0, 1, i] for i in range(2, 10)])).faces
    strips = strips_of(faces)
    assert sum(len(strip) - 2 for strip in strips) == 8


ILLEGAL = {
    "too early": [1, 2, 3, 4, 5, 6, 128, *range(9)],
    "inside a vertex": [*range(10), 128, *range(9)],
    "at the start": [128, *range(9)],
    "trailing": list(range(11)),
    "nothing": [],
}


@pytest.mark.parametrize("name", ILLEGAL)
def test_illegal_sequences_raise_or_are_repaired_and_counted(name: str) -> None:
    tokens, layout = ILLEGAL[name], AdjacentTokens()
    with pytest.raises(ValueError, match=r"illegal sequence: \d+ of \d+ strips"):
        layout.decode(tokens)
    found = layout.decode(tokens, "repair")
    assert found.problem and found.dropped == sum(token != 128 for token in tokens) - 9 * len(found.triangles)
    assert len(found.triangles) == {"too early": 1, "inside a vertex": 2, "at the start": 1, "trailing": 1, "nothing": 0}[name]


def test_the_released_reading_loses_the_rest_and_invents_a_triangle() -> None:
    layout = AdjacentTokens()
    assert len(layout.decode(ILLEGAL["inside a vertex"], "official").triangles) == 1
    found = layout.decode(ILLEGAL["inside a vertex"], "official")
    assert found.dropped == 10
    invented = layout.decode([], "official").triangles
    np.testing.assert_allclose(dequantised(invented)[0, 2], [-0.3, 0.3, 0.2], atol=1 / 128)
    assert np.isnan(released_triangles(np.array(ILLEGAL["trailing"]))).sum() == 1


def test_tokens_end_at_a_negative_one_and_lie_in_their_range() -> None:
    layout = AdjacentTokens()
    assert len(layout.decode([*range(9), -1, 7]).triangles) == 1
    with pytest.raises(ValueError, match=r"0\.\.128, got 129"):
        layout.decode([*range(8), 129])
    with pytest.raises(ValueError, match="whole number of faces"):
        FaceTokens().decode(range(10))
    with pytest.raises(ValueError, match="codes"):
        FaceTokens(num_codes=5).encode(MESHES["box"])


def test_slots_tell_the_place_in_the_strip() -> None:
    ids = torch.tensor([[BOS, *range(3, 18), 131, *range(3, 12), EOS, PAD]])
    wanted = [0, 4, 5, 6] + [4, 5, 6] * 2 + [7, 8, 9] * 2 + [3] + [4, 5, 6] * 3 + [1, 2]
    assert AdjacentTokens().slots(ids)[0].tolist() == wanted
    assert FaceTokens().slots(torch.tensor([[0, *range(3, 15), 1, 2]]))[0].tolist() == [0, *range(3, 12), 3, 4, 5, 1, 2]


# ---- the grammar ----


def ids_of(tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([[BOS], tokens + SPECIALS, [EOS]])


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("layout", [AdjacentTokens(), FaceTokens()], ids=["adjacent", "faces"])
def test_every_tokenized_mesh_is_legal(name: str, layout: TokenLayout) -> None:
    ids = ids_of(layout.encode(MESHES[name]))
    assert check_sequence(layout, ids) == ""
    assert check_sequence(layout, ids, max_faces=len(MESHES[name].faces), max_tokens=len(ids)) == ""
    assert check_sequence(layout, ids, max_faces=len(MESHES[name].faces) - 1)
    assert "no end" in check_sequence(layout, ids[:-1])


def write(grammar: MeshGrammar, rng: np.random.Generator, most: int = 400) -> list[int]:
    ids: list[int] = []
    while not grammar.is_done and len(ids) < most:
        allowed = np.flatnonzero(grammar.legal())
        assert len(allowed), "never nothing"
        ids.append(int(rng.choice(allowed)))
        grammar.push(ids[-1])
    return ids


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("layout", [AdjacentTokens(4), AdjacentTokens(2), AdjacentTokens(), FaceTokens(3), FaceTokens(num_codes=6)])
def test_whatever_is_drawn_decodes_without_loss(layout: TokenLayout, seed: int) -> None:
    rng = np.random.default_rng(seed)
    limit, faces = int(rng.integers(11, 150)), int(rng.integers(1, 12)) if seed % 2 else None
    grammar = MeshGrammar(layout, faces, limit)
    ids = write(grammar, rng)
    assert grammar.is_done and len(ids) <= limit and (faces is None or grammar.faces <= faces)
    found = layout.decode(np.array(ids[1:-1]) - SPECIALS)
    assert len(found.triangles) == grammar.faces and found.dropped == 0
    if not isinstance(layout, FaceTokens) or layout.num_codes is None:
        clean = canonical(found.triangles.reshape(-1, 3), np.arange(3 * len(found.triangles)))
        assert clean.degenerate == 0 and (clean.duplicate == 0 or layout.bins < 4)


def test_the_order_rule_is_what_tokenized_meshes_keep() -> None:
    layout = AdjacentTokens(8)
    first, second = [1, 1, 1, 2, 1, 1, 3, 1, 1], [1, 1, 1, 2, 1, 1, 4, 1, 1]
    assert check_sequence(layout, ids_of(np.array([*first, 8, *second]))) == ""
    assert "cannot stand" in check_sequence(layout, ids_of(np.array([*second, 8, *first])))
    assert check_sequence(layout, ids_of(np.array([*second, 8, *first])), use_order=False) == ""
    assert "cannot stand" in check_sequence(layout, ids_of(np.array([*first[3:6], *first[:3], *first[6:]])))


def test_no_face_without_area_and_none_twice() -> None:
    layout = AdjacentTokens(8)
    first = [1, 1, 1, 2, 1, 1, 3, 1, 1]
    for repeated in ([3, 1, 1], [2, 1, 1]):
        assert "cannot stand" in check_sequence(layout, ids_of(np.array([*first, *repeated])))
    back = [*first, 4, 1, 1, 2, 1, 1]  # the second face again, through its other edge
    assert "cannot stand" in check_sequence(layout, ids_of(np.array(back)))
    assert check_sequence(layout, ids_of(np.array(back)), use_distinct=False) == ""


def test_forced_ids_and_copies() -> None:
    grammar = MeshGrammar(AdjacentTokens(), max_faces=1)
    assert grammar.forced() == BOS
    for token in ids_of(np.array([1, 1, 1, 2, 1, 1, 3, 1, 1]))[:-1]:
        grammar.push(int(token))
    other = copy.deepcopy(grammar)
    assert grammar.forced() == EOS
    grammar.push(EOS)
    assert grammar.forced() == PAD and other.forced() == EOS
    with pytest.raises(ValueError, match="id 5 cannot stand at place 10, after 1 faces"):
        other.push(5)
    with pytest.raises(ValueError, match="max_faces=0"):
        MeshGrammar(AdjacentTokens(), 0)
