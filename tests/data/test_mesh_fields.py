"""Signed fields of meshes: closed, overlapping and open ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import trimesh

from genkit.data.mesh_fields import FieldCounts, MeshField, field_samples, triangle_distances
from genkit.data.surfaces import normalised

COUNTS = FieldCounts(volume=400, near=400, sharp=120, surface=60, edges=60)


def test_distances_to_triangles_are_exact() -> None:
    triangle = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [0, 1, 0]]])
    points = torch.tensor([[0.2, 0.2, 0.5], [-1.0, 0, 0], [0.5, -2.0, 0], [1.0, 1.0, 0], [2.0, 0, 1.0], [0.1, 0.1, 0.0]])
    expected = torch.tensor([0.5, 1.0, 2.0, 0.5**0.5, 2.0**0.5, 0.0])
    torch.testing.assert_close(triangle_distances(points, triangle), expected, rtol=0, atol=1e-6)
    assert triangle_distances(points, triangle[:0]).isinf().all()


def test_the_field_of_a_box_is_its_signed_distance() -> None:
    points = torch.rand(500, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    q = points.abs() - torch.tensor([0.5, 0.25, 0.75])
    expected = -(q.clamp_min(0).norm(dim=1) + q.amax(1).clamp_max(0))
    found = MeshField.of(trimesh.creation.box((1, 0.5, 1.5)))(points)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_overlapping_parts_have_no_inner_walls() -> None:
    a, b = trimesh.creation.box((1, 1, 1)), trimesh.creation.box((1, 1, 1))
    b.apply_translation([0.5, 0, 0])
    fine = trimesh.util.concatenate([a.subdivide(), b.subdivide()])
    field = MeshField.of(fine)
    inner = torch.tensor([[0.25, 0.0, 0.0], [0.0, 0.0, 0.0], [0.5, 0.0, 0.0]])
    assert bool((field(inner) > 0.1).all())
    assert not bool(field.sheets.any())


def test_open_sheets_become_plates_and_open_boxes_keep_their_inside() -> None:
    sheet = trimesh.Trimesh([[-1, 0, -1], [1, 0, -1], [1, 0, 1], [-1, 0, 1]], [[0, 1, 2], [0, 2, 3]], process=False)
    field = MeshField.of(sheet, thickness=0.1)
    heights = torch.tensor([[0.0, y, 0.0] for y in (0.0, 0.04, 0.06, 0.5)])
    torch.testing.assert_close(field(heights), torch.tensor([0.05, 0.01, -0.01, -0.45]), rtol=0, atol=1e-6)
    box = trimesh.creation.box((1, 1, 1))
    open_box = trimesh.Trimesh(box.vertices, box.faces[:-2], process=False)  # one side is missing
    assert float(MeshField.of(open_box)(torch.tensor([[0.0, 0.0, 0.0]]))) > 0


def test_samples_hold_points_of_every_kind_and_repeat() -> None:
    mesh, _, _ = normalised(trimesh.creation.box((1, 0.6, 1.4)))
    found = field_samples(mesh, COUNTS, 3)
    assert {name: value.shape for name, value in found.items()} == {"surface": (120, 7), "points": (920, 3), "field": (920,)}
    assert all(value.dtype == np.float32 for value in found.values())
    again = field_samples(mesh, COUNTS, 3)
    assert all(np.array_equal(found[name], again[name]) for name in found)
    near = np.abs(found["field"][400:800])
    assert np.median(near[:200]) < 0.01 < np.median(near[200:]) < 0.1
    assert found["surface"][:60, 6].sum() == 0 and found["surface"][60:, 6].all()


def test_a_mesh_without_inside_is_refused() -> None:
    line = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [2, 0, 0]], [[0, 1, 2]], process=False)
    with pytest.raises(ValueError, match="no area"):
        field_samples(line, COUNTS, 0)
