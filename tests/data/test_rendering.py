"""The software renderer: what is where, what hides what, how bright it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import trimesh

from genkit.data.rendering import AMBIENT, DIFFUSE, LIGHT, SCALE, camera_axes, render, strip, turntable

FRONT: dict[str, Any] = {"azimuth": 0.0, "elevation": 0.0, "size": 64}
SQUARE = (np.array([[-0.5, -0.5, 0], [0.5, -0.5, 0], [0.5, 0.5, 0], [-0.5, 0.5, 0]], float), np.array([[0, 1, 2], [0, 2, 3]]))


def test_axes_are_those_of_the_camera() -> None:
    for azimuth, towards in ((0, [0, 0, 1]), (90, [1, 0, 0]), (180, [0, 0, -1])):
        right, up, back = camera_axes(azimuth, 0)
        np.testing.assert_allclose(back, towards, atol=1e-12)
        np.testing.assert_allclose(up, [0, 1, 0], atol=1e-12)
        np.testing.assert_allclose(np.cross(up, back), right, atol=1e-12)
    assert camera_axes(30, 20)[2][1] == pytest.approx(np.sin(np.radians(20)))


def test_a_square_covers_its_pixels_in_its_colour() -> None:
    picture = render(*SQUARE, np.array([[200, 100, 0]] * 2, np.uint8), **FRONT)
    brightness = AMBIENT + DIFFUSE * LIGHT[2]
    inside = picture[20:44, 20:44]
    np.testing.assert_allclose(
        inside.reshape(-1, 3), np.tile(np.round(np.array([200, 100, 0]) * brightness), (inside.size // 3, 1)), atol=1
    )
    covered = (picture != 255).any(-1)
    assert covered.sum() == pytest.approx((SCALE * 64) ** 2, rel=0.1)
    rows, columns = np.nonzero(covered)
    assert abs(rows.mean() - 31.5) < 0.1 and abs(columns.mean() - 31.5) < 0.1


def test_up_is_up_and_right_is_right() -> None:
    vertices, faces = SQUARE
    small = vertices * 0.2 + [0.5, 0.7, 0]
    rows, columns = np.nonzero((render(small, faces, **FRONT) != 255).any(-1))
    assert rows.mean() < 20 and columns.mean() > 44


def test_the_nearer_face_hides_the_other_whatever_the_order() -> None:
    vertices, faces = SQUARE
    both = np.concatenate([vertices, vertices + np.array([0, 0, 0.3])])
    colours = np.array([[255, 0, 0]] * 2 + [[0, 0, 255]] * 2, np.uint8)
    order = np.concatenate([faces, faces + 4])
    front = render(both, order, colours, **FRONT)
    assert front[32, 32, 0] == 0 and front[32, 32, 2] > 0
    assert np.array_equal(render(both, order[::-1], colours[::-1], **FRONT), front)
    back = render(both, order, colours, azimuth=180.0, elevation=0.0, size=64)
    assert back[32, 32, 0] > 0 and back[32, 32, 2] == 0


def test_chunks_of_faces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = trimesh.creation.icosphere(3)
    whole = render(mesh.vertices, mesh.faces, azimuth=30.0)
    monkeypatch.setattr("genkit.data.rendering.PAIRS", 500)
    assert np.array_equal(render(mesh.vertices, mesh.faces, azimuth=30.0), whole)


def test_degenerate_faces_and_faces_outside_are_harmless() -> None:
    vertices = np.array([[0, 0, 0], [0, 0, 0], [0, 0, 0], [9, 9, 9], [9, 9, 8], [9, 8, 9]], float)
    assert (render(vertices, np.array([[0, 1, 2], [3, 4, 5]]), **FRONT) == 255).all()


def test_a_turntable_fits_any_mesh_and_keeps_its_colours() -> None:
    box = trimesh.creation.box((10, 30, 20))
    box.apply_translation([1e4, 0, 0])
    box.visual.face_colors = [[0, 255, 0, 255]] * 12
    pictures = turntable(box, views=4, size=48)
    assert len(pictures) == 4 and strip(pictures).size == (192, 48)
    for picture in pictures:
        pixels = np.asarray(picture).astype(int)
        covered = (pixels != 255).any(-1)
        assert covered.any() and not covered[0].any() and not covered[:, 0].any()
        assert (pixels[covered][:, 1] > pixels[covered][:, 0]).mean() > 0.9


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="elevation=90"):
        render(*SQUARE, elevation=90.0)
    with pytest.raises(ValueError, match="size=0"):
        render(*SQUARE, size=0)
    with pytest.raises(ValueError, match="views"):
        turntable(trimesh.creation.box(), views=0)
    with pytest.raises(ValueError, match="finite"):
        turntable(trimesh.Trimesh([[0, 0, np.inf], [1, 0, 0], [0, 1, 0]], [[0, 1, 2]], process=False))


def test_a_wireframe_darkens_the_edges_of_visible_faces_only() -> None:
    plain, edges = (render(*SQUARE, np.array([[200, 200, 200]] * 2, np.uint8), **FRONT, wireframe=wire) for wire in (False, True))
    changed = (plain != edges).any(-1)
    assert 0.02 < changed.mean() < 0.3 and edges[changed].mean() < plain[changed].mean()
    assert not changed[(plain == 255).all(-1)].any()
    middle = len(edges) // 2
    assert changed[middle, middle] or changed[middle - 1, middle - 1], "the diagonal of the square"
