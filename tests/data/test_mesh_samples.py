"""Meshes for training: welding, bounds, augmentation, condition points."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import trimesh

from genkit.data.mesh_augment import (
    Augmentation,
    augmented,
    centred_box,
    condition_points,
    normalised_points,
    points_on_faces,
    rough_points,
)
from genkit.data.mesh_samples import MeshBounds, MeshSamples, parts_of, welded


def write_meshes(folder: Path) -> Path:
    """Write a box, a ball, a mesh without area and something that is no mesh."""
    folder.mkdir(exist_ok=True)
    trimesh.creation.box((1, 2, 3)).export(folder / "box.obj")
    trimesh.creation.icosphere(1).export(folder / "ball.glb")
    (folder / "flat.obj").write_text("v 0 0 0\nv 1 0 0\nv 1 0 0\nf 1 2 3\n")
    (folder / "broken.stl").write_bytes(b"no mesh at all")
    return folder


def test_meshes_within_bounds_are_taken_and_the_others_counted(tmp_path: Path) -> None:
    samples = MeshSamples(write_meshes(tmp_path), MeshBounds(max_faces=20))
    assert [mesh.name for mesh in samples.meshes] == ["box"] and len(samples) == 1
    assert samples.refused["more faces than max_faces"] == 1 and samples.refused.total() == 3
    assert int(samples[0]["index"]) == 0
    assert MeshSamples(tmp_path).data_hash != samples.data_hash
    with pytest.raises(ValueError, match="none of 4 meshes"):
        MeshSamples(tmp_path, MeshBounds(max_faces=3))
    with pytest.raises(IndexError):
        samples[1]
    with pytest.raises(ValueError, match="ascend"):
        MeshBounds(5, 4)
    assert MeshBounds(min_ratio=0.6).refusal(5, 10) == "vertices per face out of bounds"


def test_welding_joins_equal_positions_and_drops_what_is_superfluous() -> None:
    corners = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 0, 1e-9], [0, 1, 0], [1, 1, 0], [9, 9, 9]])
    faces = np.array([[0, 1, 2], [3, 5, 4], [2, 0, 1], [1, 3, 5]])
    vertices, found = welded(corners[:6], faces)
    assert vertices.shape == (4, 3) and found.shape == (2, 3)
    with pytest.raises(ValueError, match="degenerate"):
        welded(corners[:6], np.array([[1, 3, 5]]))


def test_meshes_with_too_many_faces_are_taken_apart(tmp_path: Path) -> None:
    row = [trimesh.creation.box((1, 1, 1), trimesh.transformations.translation_matrix((x, 0, 0))) for x in (0, 2, 4, 90)]
    ball = trimesh.creation.icosphere(3).apply_translation((0, 9, 0))
    trimesh.util.concatenate([*row, trimesh.creation.box((1, 3, 1)).apply_translation((6, 0, 0)), ball]).export(tmp_path / "all.obj")
    trimesh.creation.box((1, 2, 3)).export(tmp_path / "box.obj")
    assert [mesh.name for mesh in MeshSamples(tmp_path, MeshBounds(max_faces=40)).meshes] == ["box"]
    samples = MeshSamples(tmp_path, MeshBounds(max_faces=40), parts=True)
    sizes = sorted(len(mesh.faces) for mesh in samples.meshes)
    assert sizes == [12, 12, 12, 24, 36] and not samples.refused, "a cube once, a long box, the box; groups of three and two"
    assert sum(mesh.name.startswith("all/") for mesh in samples.meshes) == 4
    three = next(mesh for mesh in samples.meshes if len(mesh.faces) == 36)
    assert np.ptp(three.vertices, axis=0).max() == pytest.approx(1) and len(three.vertices) == 24
    assert three.vertices[:, 0].max() - three.vertices[:, 0].min() == pytest.approx(1), "neighbours in a row, not the one far away"
    ball.export(tmp_path / "ball.obj")
    assert MeshSamples(tmp_path, MeshBounds(max_faces=40), parts=True).refused == {"more faces than max_faces": 1}, "a ball has no parts"
    (tmp_path / "ball.obj").unlink()
    assert parts_of(np.asarray(ball.vertices), np.asarray(ball.faces), 40) == []
    assert len(MeshSamples(tmp_path, MeshBounds(min_faces=20, max_faces=40), parts=True)) == 2
    assert len(MeshSamples(tmp_path, MeshBounds(max_faces=40), parts=True, whole_repeats=3)) == len(samples) + 2


def test_augmented_meshes_stay_inside_and_differ() -> None:
    box, rng = trimesh.creation.box((1, 2, 3)), np.random.default_rng(0)
    seen = []
    for _ in range(20):
        moved = augmented(box.vertices, Augmentation.draw(rng))
        assert np.abs(moved).max() <= 0.5
        assert np.ptp(moved, axis=0).max() == pytest.approx(1)
        seen.append(moved)
    assert np.ptp([part[0, 0] for part in seen]) > 0.1
    np.testing.assert_allclose(augmented(box.vertices, Augmentation()), centred_box(box.vertices))


def test_quarter_turns_leave_boxes_along_the_axes() -> None:
    box, rng, sides = trimesh.creation.box((1, 2, 3)), np.random.default_rng(0), set()
    for _ in range(20):
        draw = Augmentation.draw(rng, "quarter", 0.0)
        moved = augmented(box.vertices, draw)
        assert all(len(np.unique(axis)) == 2 for axis in moved.T), "exactly two positions a side"
        np.testing.assert_array_equal(moved.min(0), -moved.max(0), "centred")
        sides.add(round(draw.angle / (np.pi / 2), 6))
    assert sides == {0, 1, 2, 3}


def test_half_of_the_meshes_are_mirrored() -> None:
    wedge, rng = trimesh.creation.cone(1, 2, sections=3), np.random.default_rng(0)
    draws = [Augmentation.draw(rng, mirror=True) for _ in range(40)]
    assert 10 < sum(draw.mirror for draw in draws) < 30 and not Augmentation.draw(rng).mirror
    plain, turned = (augmented(wedge.vertices, Augmentation(mirror=mirror)) for mirror in (False, True))
    np.testing.assert_allclose(turned, plain * (-1, 1, 1))


def test_points_lie_on_the_surface_in_proportion_to_area() -> None:
    box, rng = trimesh.creation.box((1, 2, 4)), np.random.default_rng(0)
    points, normals = points_on_faces(box.vertices, box.faces, rng.random(4000), rng.random((4000, 2)))
    np.testing.assert_allclose(np.abs(points / (0.5, 1, 2)).max(1), 1, atol=1e-9)
    shares = [(np.abs(normals[:, axis]) > 0.5).mean() for axis in range(3)]
    np.testing.assert_allclose(shares, np.array([8, 4, 2]) / 14, atol=0.03)
    rows = condition_points(centred_box(box.vertices), box.faces, rng.random(50), rng.random((50, 2)))
    assert rows.dtype == np.float16 and np.abs(rows[:, :3]).max() <= 1
    with pytest.raises(ValueError, match="no area"):
        points_on_faces(np.zeros((3, 3)), np.array([[0, 1, 2]]), rng.random(5), rng.random((5, 2)))


def test_rough_points_are_as_rough_as_asked_with_normals_of_length_one() -> None:
    box, rng = trimesh.creation.box((1, 2, 4)), np.random.default_rng(0)
    rows = condition_points(centred_box(box.vertices), box.faces, rng.random(2000), rng.random((2000, 2)))
    np.testing.assert_allclose(rough_points(rows, 0.0, rng), rows, atol=1e-3)
    rough = rough_points(rows, 0.02, rng)
    moved = (rough - rows).astype(float)
    inside = np.abs(rows[:, :3]).max(1) < 0.9  # no coordinate is cut
    assert rough.dtype == np.float16 and np.abs(rough[:, :3]).max() <= 1
    assert moved[inside, :3].std() == pytest.approx(0.02, rel=0.1)
    np.testing.assert_allclose(np.linalg.norm(rough[:, 3:].astype(float), axis=1), 1, atol=2e-3)
    assert moved[:, 3:].std() == pytest.approx(0.2 * (2 / 3) ** 0.5, rel=0.1)  # what is left across the normals


def test_points_come_back_to_their_place() -> None:
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.random((30, 3)) * 50 + 1e6, np.tile([1.0, 0, 0], (30, 1))], axis=1)
    found = normalised_points(rows)
    assert np.abs(found.points[:, :3]).max() == np.float16(0.9995)
    np.testing.assert_allclose(found.back(found.points[:, :3].astype(float) / 2 / 0.9995), rows[:, :3], atol=0.05)
