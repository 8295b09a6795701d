"""Inside and outside of closed meshes by crossings."""

from __future__ import annotations

import numpy as np
import torch
import trimesh

from genkit.data.containment import contains
from genkit.data.winding import winding_numbers


def test_crossings_agree_with_winding_numbers() -> None:
    draw = np.random.default_rng(0)
    ring = trimesh.creation.torus(0.6, 0.25)
    ball = trimesh.creation.icosphere(3, 0.3)
    ball.apply_translation((1.5, 0.2, 0.1))
    mesh = trimesh.util.concatenate([ring, ball])
    points = draw.uniform(-2, 2, (3000, 3))
    found = contains(mesh.vertices, mesh.faces, points)
    wanted = (
        winding_numbers(torch.from_numpy(points), torch.from_numpy(np.array(mesh.vertices)), torch.from_numpy(np.array(mesh.faces))) > 0.5
    )
    assert np.array_equal(found, wanted.numpy()) and 20 < found.sum() < 1000


def test_none_inside_nothing_and_few_points() -> None:
    box = trimesh.creation.box()
    assert contains(box.vertices, box.faces, np.zeros((0, 3))).shape == (0,)
    assert contains(np.zeros((0, 3)), np.zeros((0, 3), int), np.zeros((2, 3))).tolist() == [False, False]
    assert contains(box.vertices, box.faces, np.array([[0.1, 0.2, 0.3], [0.1, 0.2, 0.6], [5, 5, 5]])).tolist() == [True, False, False]
