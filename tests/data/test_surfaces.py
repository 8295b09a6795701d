"""Points on surfaces: by area, on sharp edges; odd meshes are refused."""

from __future__ import annotations

import numpy as np
import pytest
import trimesh

from genkit.data.surfaces import SHARP_COSINE, normalised, sharp_edges, smallest_cosines, surface_points


def test_a_normalised_mesh_fills_the_box_and_can_be_undone() -> None:
    mesh = trimesh.creation.box((1, 3, 2))
    mesh.apply_translation([1e6, 0, 0])
    found, centre, factor = normalised(mesh)
    np.testing.assert_allclose(found.bounds[:, 1], [-0.9999, 0.9999], atol=1e-9)
    np.testing.assert_allclose(np.asarray(found.vertices) / factor + centre, mesh.vertices, atol=1e-6)


def test_uniform_points_are_on_the_surface_by_area() -> None:
    mesh, _, _ = normalised(trimesh.creation.box((1, 2, 4)))
    rows = surface_points(mesh, 4000, 0, np.random.default_rng(0))
    assert rows.shape == (4000, 7) and rows.dtype == np.float32
    half = np.asarray(mesh.extents) / 2
    assert np.abs(np.abs(rows[:, :3]) / half).max(1) == pytest.approx(1, abs=1e-5)
    share = (np.abs(rows[:, 3]) > 0.5).mean()  # faces across x: 2 * (2 * 4) of 2 * (2 * 4 + 1 * 4 + 1 * 2)
    assert share == pytest.approx(8 / 14, abs=0.03)
    np.testing.assert_allclose(np.linalg.norm(rows[:, 3:6], axis=1), 1, atol=1e-5)
    assert not rows[:, 6].any()


def test_sharp_points_are_on_the_edges_of_a_box_and_nowhere_on_a_ball() -> None:
    box, _, _ = normalised(trimesh.creation.box((1, 1, 1)))
    rows = surface_points(box, 10, 500, np.random.default_rng(0))[10:]
    assert rows[:, 6].all()
    on_face = np.isclose(np.abs(rows[:, :3]), 0.9999, atol=1e-5).sum(1)
    assert (on_face >= 1).all() and (on_face >= 2).mean() > 0.5  # the diagonals of the faces have sharp ends too
    ball, _, _ = normalised(trimesh.creation.icosphere(4))
    assert not surface_points(ball, 10, 50, np.random.default_rng(0))[:, 6].any()


def test_the_true_minimum_finds_what_the_released_code_misses() -> None:
    mesh = trimesh.creation.box((1, 0.6, 1.4)).subdivide().subdivide()
    arguments = (np.asarray(mesh.vertex_normals), np.asarray(mesh.face_normals), np.asarray(mesh.faces))
    true, official = smallest_cosines(*arguments), smallest_cosines(*arguments, official=True)
    assert (true <= official + 1e-12).all()
    assert (true < SHARP_COSINE).sum() >= (official < SHARP_COSINE).sum()
    edges = sharp_edges(arguments[2], true < SHARP_COSINE)
    assert len(edges) and (true[edges] < SHARP_COSINE).all()


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (trimesh.Trimesh(), "no faces"),
        (trimesh.Trimesh([[0, 0, 0], [0, 0, np.nan], [1, 0, 0]], [[0, 1, 2]], process=False), "1 of 3 vertices are not finite"),
        (trimesh.Trimesh([[1, 1, 1]] * 3, [[0, 1, 2]], process=False), "no extent"),
    ],
)
def test_odd_meshes_are_refused(mesh: trimesh.Trimesh, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        normalised(mesh)


def test_a_mesh_without_area_is_refused() -> None:
    mesh, _, _ = normalised(trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [2, 0, 0]], [[0, 1, 2]], process=False))
    with pytest.raises(ValueError, match="no area"):
        surface_points(mesh, 5, 0, np.random.default_rng(0))
