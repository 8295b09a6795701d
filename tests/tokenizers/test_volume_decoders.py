"""Decoders of fields on a real little VAE: meshes equal the dense one, chunks do not matter, cells keep few tokens, no surface is said."""

from __future__ import annotations

import copy
import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from torch import Tensor
from torch.testing import assert_close

from genkit.convert import flashvdm
from genkit.tokenizers import isosurface as surfaces
from genkit.tokenizers.adaptive_kv import SELECTIONS, FlashDecoder, groups
from genkit.tokenizers.isosurface import decimated, isosurface, to_mesh, without_floaters
from genkit.tokenizers.shape_vae import ShapeVAE
from genkit.tokenizers.volume_decoders import DenseDecoder, HierarchicalDecoder, NoSurfaceError, level_resolutions
from genkit.tokenizers.volume_grid import SparseField, children, corner_keys, dilate, pack, sign_changes, unpack
from genkit.weights import read_safetensors

CASE = Path(__file__).parent.parent / "parity" / "goldens" / "flashvdm" / "volume_decode"
R, LEAST = 60, 30


@cache
def shape() -> tuple[ShapeVAE, Tensor]:
    """Return a VAE fitted to a torus, a plate and a ball, and the tokens of that."""
    vae, _ = flashvdm.from_official(read_safetensors(CASE / "weights.safetensors"), heads=4, num_latents=96)
    with torch.no_grad():
        return vae, vae.decode(read_safetensors(CASE / "inputs.safetensors")["latents"])[0]


@cache
def dense() -> SparseField:
    return DenseDecoder()(*shape(), R)


def vertex_set(field: SparseField) -> set[tuple[int, ...]]:
    return {tuple(row) for row in (isosurface(field).vertices * 1000).round().astype(int)}


@pytest.mark.parametrize("rule", ["grow", "band"])
def test_the_hierarchical_mesh_is_the_dense_mesh(rule: str) -> None:
    field = HierarchicalDecoder(rule=rule, min_resolution=LEAST)(*shape(), R)
    assert field.keys is not None
    assert_close(field.values, dense().values[field.keys], rtol=0, atol=1e-5)
    assert vertex_set(field) == vertex_set(dense())
    assert len(isosurface(field).faces) == len(isosurface(dense()).faces)
    assert field.evaluations < dense().evaluations


def test_our_rule_asks_at_fewer_points_than_the_published_one() -> None:
    ours, band = (HierarchicalDecoder(rule=rule, min_resolution=LEAST)(*shape(), R) for rule in ("grow", "band"))
    assert ours.evaluations < 0.7 * band.evaluations


@pytest.mark.parametrize("selection", SELECTIONS)
def test_flash_with_all_tokens_is_hierarchical(selection: str) -> None:
    decoder = FlashDecoder(selection=selection, num_tokens=96, mass=1.0, min_resolution=15)
    trace: list[dict[str, Any]] = []
    field = decoder(*shape(), R, trace)
    plain = HierarchicalDecoder(rule="band", min_resolution=15)(*shape(), R)
    if selection == "merge":  # keeps what has weight, whatever num_tokens is
        kept = torch.cat([entry["kept"] for entry in trace if "kept" in entry]).float().mean()
        assert kept > 0.5
        return
    assert torch.equal(field.keys, plain.keys)  # type: ignore[arg-type]
    assert_close(field.values, plain.values, rtol=0, atol=1e-4)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_cells_attend_to_few_tokens_and_the_mesh_is_near(selection: str) -> None:
    trace: list[dict[str, Any]] = []
    field = FlashDecoder(selection=selection, mass=0.95, min_resolution=15)(*shape(), R, trace)
    kept = torch.cat([entry["kept"] for entry in trace if "kept" in entry]).float().mean()
    assert kept < (1.0 if selection == "merge" else 0.6)
    mesh, whole = (to_mesh(isosurface(f), R) for f in (field, dense()))
    assert abs(mesh.area - whole.area) < 0.1 * whole.area


@pytest.mark.parametrize("decoder", [DenseDecoder, HierarchicalDecoder, FlashDecoder])
def test_results_do_not_depend_on_the_chunks(decoder: Any) -> None:
    options = {} if decoder is DenseDecoder else {"min_resolution": 15}
    fields = [decoder(num_chunks=chunk, **options)(*shape(), 32) for chunk in (700, 100_000)]
    assert_close(fields[0].values, fields[1].values, rtol=0, atol=1e-5)


def test_levels_are_those_published() -> None:
    assert level_resolutions(384, 63) == [96, 192, 384] and level_resolutions(32, 63) == [32]
    found = {r: FlashDecoder().levels(r) for r in (32, 128, 256, 380, 384, 512)}
    assert found == {
        32: [31], 128: [63, 126], 256: [63, 126, 252], 380: [95, 190, 380], 384: [95, 190, 380], 512: [63, 126, 252, 504],
    }  # fmt: skip
    assert groups([3, 1, 5, 5, 9], 10) == [(0, 2), (2, 4), (4, 5)]


def test_no_surface_is_said_not_an_index_error() -> None:
    vae, tokens = shape()
    vae = copy.deepcopy(vae)
    torch.nn.init.constant_(vae.head.out.bias, -50.0)
    for decoder in (HierarchicalDecoder(min_resolution=15), FlashDecoder(min_resolution=15)):
        with pytest.raises(NoSurfaceError, match=r"no surface found: the field lies in \[-5"):
            decoder(vae, tokens, 32)
    with pytest.raises(NoSurfaceError, match="no surface found"):
        isosurface(DenseDecoder()(vae, tokens, 16))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda vae, tokens: DenseDecoder()(vae, tokens, 3), "4 .. 1024, got 3"),
        (lambda vae, tokens: DenseDecoder()(vae, tokens, 2048), "34.4 GB"),
        (lambda vae, tokens: HierarchicalDecoder()(vae, tokens, 127), "multiple of 2, 126"),
        (lambda vae, tokens: DenseDecoder()(vae, tokens[None], 32), "one shape"),
        (lambda vae, tokens: DenseDecoder(num_chunks=0)(vae, tokens, 32), "num_chunks"),
        (lambda vae, tokens: HierarchicalDecoder(rule="edge"), "unknown rule"),
        (lambda vae, tokens: FlashDecoder(selection="best"), "unknown selection"),
        (lambda vae, tokens: FlashDecoder(mass=0.0), "mass"),
    ],
)
def test_impossible_requests_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(*shape())


def ball(resolution: int = 20, radius: float = 0.7, centre: tuple[float, float, float] = (0.1, 0.0, -0.1)) -> SparseField:
    axis = torch.linspace(-1.01, 1.01, resolution + 1)
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)
    values = radius - (grid - torch.tensor(centre)).norm(dim=-1)
    return SparseField(resolution, 1.01, None, values.flatten(), values.numel())


def test_a_ball_is_where_it_should_be_and_closed() -> None:
    field = ball(40)
    mesh = to_mesh(isosurface(field), 40)
    np.testing.assert_allclose(mesh.bounds, [[-0.6, -0.7, -0.8], [0.8, 0.7, 0.6]], atol=0.01)
    assert mesh.is_watertight and mesh.volume == pytest.approx(4 / 3 * np.pi * 0.7**3, rel=0.02)
    legacy = to_mesh(isosurface(field), 40, legacy_scale=40)
    assert legacy.bounds[1, 0] < mesh.bounds[1, 0] - 0.03


def test_slabs_give_the_mesh_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = isosurface(ball(20))
    monkeypatch.setattr(surfaces, "SLAB_POINTS", 4 * 21**2)
    parts = isosurface(ball(20))
    assert len(parts.vertices) == len(whole.vertices) and len(parts.faces) == len(whole.faces)
    np.testing.assert_allclose(np.sort(parts.vertices, 0), np.sort(whole.vertices, 0), atol=1e-5)
    assert to_mesh(parts, 20).is_watertight


def test_unknown_points_give_no_faces() -> None:
    field = ball(20)
    near = (field.values.abs() < 0.2).nonzero()[:, 0]
    sparse = SparseField(20, 1.01, near, field.values[near], len(near))
    np.testing.assert_allclose(np.sort(isosurface(sparse).vertices, 0), np.sort(isosurface(field).vertices, 0), atol=1e-5)
    assert int(sparse.dense(5, 8).isfinite().sum()) == int(((near >= 5 * 441) & (near < 8 * 441)).sum())


def test_floaters_go_and_budgets_hold() -> None:
    big, small = trimesh.creation.icosphere(4), trimesh.creation.box((0.1, 0.1, 0.1))
    small.apply_translation([2, 0, 0])
    both = trimesh.util.concatenate([big, small])
    assert len(without_floaters(both).faces) == len(big.faces)
    assert len(without_floaters(both, 0.0).faces) == len(both.faces)
    assert len(decimated(big, 200).faces) <= 200
    assert decimated(small, 200) is small
    plates = [trimesh.creation.box((1, 1, 0.004)).subdivide_to_size(0.05) for _ in range(3)]  # thin walls, at which quadrics alone stop
    for plate, turn in zip(plates, ([1, 0, 0], [0, 1, 0], [1, 1, 0]), strict=True):
        plate.apply_transform(trimesh.transformations.rotation_matrix(0.7, turn))
    thin = decimated(trimesh.util.concatenate(plates), 100)
    assert 0 < len(thin.faces) <= 100 and np.ptp(thin.vertices, axis=0).max() > 0.9
    with pytest.raises(ValueError, match="at least 4"):
        decimated(big, 3)


def test_keys_pack_dilate_and_refine() -> None:
    side = 5
    keys = torch.tensor([0, 31, 124])
    assert torch.equal(pack(unpack(keys, side), side), keys)
    grid = torch.zeros(1, 1, side, side, side)
    grid.view(-1)[keys] = 1
    expected = torch.nn.functional.max_pool3d(grid, 3, 1, 1).flatten().nonzero()[:, 0]
    assert torch.equal(dilate(keys, side), expected)
    assert len(children(torch.arange(8), 2).unique()) == 64
    assert corner_keys(torch.tensor([0]), 4)[0].tolist() == [0, 1, 5, 6, 25, 26, 30, 31]
    values = torch.randn(side**3, generator=torch.Generator().manual_seed(0))
    some = torch.arange(0, side**3, 2)
    part = sign_changes(some, values[some], side)
    assert part.sum() == 0 or part.dtype == torch.bool
    assert sign_changes(None, values, side).float().mean() > 0.5


@pytest.mark.parametrize(
    "decoder", [DenseDecoder(), HierarchicalDecoder(min_resolution=16), FlashDecoder(min_resolution=15, mass=1.0, selection="mass")]
)
def test_shapes_that_run_beyond_the_grid_are_closed_at_its_border(decoder: Any) -> None:
    vae, tokens = shape()
    small = dataclasses.replace(decoder, bound=0.5)  # cuts the torus
    mesh = to_mesh(isosurface(small(vae, tokens, 32)), 32, 0.5)
    assert mesh.is_watertight and mesh.is_winding_consistent
    cut = to_mesh(isosurface(dataclasses.replace(small, closed=False)(vae, tokens, 32)), 32, 0.5)
    assert not cut.is_watertight
    for other in (small, dataclasses.replace(small, closed=False)):
        with pytest.raises(NoSurfaceError):
            isosurface(other(constant(1.0), tokens, 32))


def constant(value: float) -> Any:
    """The model, its field everywhere the same."""
    vae: Any = copy.deepcopy(shape()[0])
    with torch.no_grad():
        vae.head.out.weight.zero_()
        vae.head.out.bias.fill_(value)
    return vae
