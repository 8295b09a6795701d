"""The mesh pipeline: shapes in, meshes out; legal sequences, seeds, stopping, resuming, going on past the trained length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from safetensors.torch import save_file

from genkit import convert
from genkit.convert import mesh_vq, meshanything, michelangelo
from genkit.pipelines.base import GenPipeline
from genkit.pipelines.mesh_loop import SequenceWriter, TokenSampling, loop, sequences
from genkit.pipelines.meshanything import MeshAnythingPipeline, misfit, turned_faces
from genkit.pipelines.seeds import resolve_seeds
from genkit.pipelines.surface_shell import surface_shell
from genkit.pipelines.token_draws import inverse_cdf
from genkit.tokenizers.mesh_tokens import EOS
from tests.generators.toy_meshes import mesh_pipeline, mesh_transformer, official_mesh_pipeline, point_encoder

BOX = trimesh.creation.box((1, 2, 0.5))
CLOUD = np.concatenate([np.random.default_rng(0).standard_normal((40, 3)), np.tile([0.0, 1.0, 0.0], (40, 1))], axis=1)


@pytest.fixture(scope="module")
def pipe() -> MeshAnythingPipeline:
    return mesh_pipeline()


def test_every_sequence_is_a_mesh_at_the_place_of_its_shape(pipe: MeshAnythingPipeline) -> None:
    far = BOX.copy()
    far.vertices = np.asarray(far.vertices) * 1000 + [5e6, 0, -3e5]  # half precision could not tell these points apart
    out = pipe([BOX, far], do_sample=True, generator=[5, 5], on_illegal="raise")
    for mesh, tokens, report in zip(out.meshes, out.tokens, out.reports, strict=True):
        assert len(mesh.faces) == report.faces > 0 and report.is_complete
        assert (report.dropped, report.degenerate, report.duplicate, report.problem) == (0, 0, 0, "")
        assert report.tokens == len(tokens) <= 58
    np.testing.assert_array_equal(out.tokens[0], out.tokens[1])
    np.testing.assert_allclose(out.meshes[1].vertices, np.asarray(out.meshes[0].vertices) * 1000 + [5e6, 0, -3e5], rtol=1e-6)
    assert np.abs(out.meshes[0].vertices).max() <= 1.001


def test_a_mesh_depends_on_its_own_seed_only(pipe: MeshAnythingPipeline) -> None:
    together = pipe([BOX, CLOUD], do_sample=True, num_images_per_prompt=2, generator=[1, 2, 3, 4])
    at_once = pipe([BOX, CLOUD], do_sample=True, num_images_per_prompt=2, generator=[1, 2, 3, 4], samples_at_once=4)
    alone = pipe(CLOUD, do_sample=True, generator=[4])
    assert together.seeds == [1, 2, 3, 4]
    for one, other in zip(together.tokens, at_once.tokens, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(together.tokens[3], alone.tokens[0])
    assert any(len(together.tokens[0]) != len(tokens) or (together.tokens[0] != tokens).any() for tokens in together.tokens[1:])


def test_the_nearest_of_some_candidates_is_kept(pipe: MeshAnythingPipeline) -> None:
    out = pipe([BOX, CLOUD], do_sample=True, candidates=4, generator=[1, 2])
    clouds = [pipe.points(shape, seed) for shape, seed in ((BOX, 1), (CLOUD, 2))]
    for place, seed in enumerate((1, 2)):
        drawn = [seed, *resolve_seeds(seed, 3)]
        run, features = pipe.prepare([clouds[place]] * 4, TokenSampling(do_sample=True), None, None, True, None)
        *_, last = loop(run, drawn)
        meshes = [pipe._finish(item, clouds[place])[0] for item in pipe.decode(last.sample, features, "raise")]
        best = int(np.argmin([misfit(mesh, clouds[place]) for mesh in meshes]))
        np.testing.assert_array_equal(out.meshes[place].vertices, meshes[best].vertices)
        assert out.seeds[place] == drawn[best]
    assert misfit(BOX, clouds[0]) < 0.5 * misfit(trimesh.creation.box((0.1, 0.1, 3)), clouds[0])
    assert misfit(trimesh.Trimesh(), clouds[0]) == np.inf
    for count in (0, 2):
        with pytest.raises(ValueError, match="candidates must be at least 1"):
            pipe(BOX, candidates=count, do_sample=False)


def test_a_model_says_how_many_candidates_it_wants_and_how_they_are_drawn(pipe: MeshAnythingPipeline) -> None:
    own = type(pipe)(pipe.transformer, pipe.point_encoder, num_points=pipe.config["num_points"], candidates=3, temperature=0.1)
    own.set_progress_bar_config(disable=True)
    three = pipe(BOX, candidates=3, temperature=0.1, generator=[2])
    assert not np.array_equal(three.tokens[0], pipe(BOX, candidates=3, generator=[2]).tokens[0])
    assert three.seeds[0] in [2, *resolve_seeds(2, 2)]
    np.testing.assert_array_equal(own(BOX, generator=[2]).tokens[0], three.tokens[0])
    np.testing.assert_array_equal(own(BOX, do_sample=False, generator=[2]).tokens[0], pipe(BOX, generator=[2]).tokens[0])
    np.testing.assert_array_equal(own(BOX, candidates=1, generator=[2]).tokens[0], pipe(BOX, generator=[2]).tokens[0])
    with pytest.raises(ValueError, match="candidates must be at least 1"):
        type(pipe)(pipe.transformer, pipe.point_encoder, candidates=0)
    with pytest.raises(ValueError, match="temperature above 0"):
        type(pipe)(pipe.transformer, pipe.point_encoder, temperature=0.0)


def test_budgets_and_targets_of_faces(pipe: MeshAnythingPipeline) -> None:
    for most in (1, 3):
        assert all(
            report.faces <= most for report in pipe(BOX, max_faces=most, generator=7, num_images_per_prompt=3, do_sample=True).reports
        )
    few, many = (
        sum(r.faces for r in pipe(BOX, face_target=t, face_bias=60, do_sample=True, num_images_per_prompt=4, generator=1).reports)
        for t in (1, 9)
    )
    assert few < many
    with pytest.raises(ValueError, match="takes the grammar"):
        pipe(BOX, max_faces=3, use_grammar=False)
    with pytest.raises(ValueError, match="max_faces must be at least 1"):
        pipe(BOX, max_faces=0)


def test_a_loop_goes_on_from_a_saved_state_and_from_a_changed_id(pipe: MeshAnythingPipeline) -> None:
    options: dict[str, Any] = {"sampling": TokenSampling(do_sample=True), "generator": [3, 9]}
    states = [state.clone() for state in pipe.iterate([BOX, CLOUD], **options)]
    again = list(pipe.iterate(state=states[6]))
    assert torch.equal(again[-1].sample, states[-1].sample) and again[0].index == 7
    changed = states[12].clone()
    changed.sample[0, -1] = 3 + (changed.sample[0, -1] - 3 + 1) % 128
    other = list(pipe.iterate(state=changed))[-1].sample
    assert torch.equal(other[0, :13], changed.sample[0])
    meshes = pipe.preview(states[15])
    assert all(mesh is not None and len(mesh.faces) for mesh in meshes) and pipe.preview(states[3]) == [None, None]
    illegal = states[6].clone()
    illegal.sample[0, -1] = EOS
    with pytest.raises(ValueError, match="cannot stand"):
        next(pipe.iterate(state=illegal))
    for given in ({"shape": BOX}, {"max_faces": 3}, {"use_grammar": False}):
        with pytest.raises(ValueError, match="leave shape"):
            pipe.iterate(state=illegal, **given)


def test_callbacks_see_and_change_the_ids(pipe: MeshAnythingPipeline) -> None:
    seen: list[int] = []

    def callback(own: Any, index: int, timestep: float, fields: dict[str, Any]) -> None:
        seen.append(fields["sample"].shape[1])

    out = pipe(BOX, callback_on_step_end=callback)
    assert seen == list(range(1, len(out.tokens[0]) + 3))


def test_forced_ids_cost_no_evaluation(pipe: MeshAnythingPipeline) -> None:
    *_, last = pipe.iterate(BOX, max_faces=1)
    assert last.evaluations <= last.index - 1, "bos and the end are certain"


def test_sequences_go_on_past_the_trained_length() -> None:
    pipe = mesh_pipeline(max_tokens=24)
    out = pipe(BOX, max_tokens=120, face_target=40, face_bias=1000.0)
    assert len(out.tokens[0]) > 60 and out.reports[0].problem == ""
    wide = mesh_pipeline(max_tokens=24)
    two = wide([BOX, CLOUD], max_tokens=120, face_target=40, face_bias=1000.0, samples_at_once=2, generator=out.seeds * 2)
    np.testing.assert_array_equal(two.tokens[0], out.tokens[0])


def test_the_cache_grows_without_changing_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mesh_transformer()
    prefix = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0))
    logits = []
    for first in (1024, 6):
        monkeypatch.setattr("genkit.pipelines.mesh_loop.FIRST_CACHE", first)
        writer = SequenceWriter(model, prefix)
        for token in range(20):
            logits.append(writer.logits())
            writer.push(torch.tensor([token + 3, token + 4]))
    torch.testing.assert_close(torch.stack(logits[:20]), torch.stack(logits[20:]))


def test_filters_and_draws() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.2, 0.3, 0.4]]))
    assert torch.isinf(TokenSampling(top_k=2, top_p=1.0).filtered(logits)).tolist() == [[True, True, False, False]]
    assert torch.isinf(TokenSampling(top_k=0, top_p=0.65).filtered(logits)).tolist() == [[True, True, False, False]]
    torch.testing.assert_close(TokenSampling(top_k=0, top_p=1.0, temperature=0.5).filtered(logits), 2 * logits)
    drawn = [int(inverse_cdf(logits, torch.tensor([u]))[0]) for u in (0.0, 0.0999, 0.101, 0.31, 0.99999)]
    assert drawn == [0, 0, 1, 2, 3]
    masked = torch.tensor([[0.0, 0.0, -torch.inf]])
    assert int(inverse_cdf(masked, torch.tensor([0.99999999]))[0]) == 1
    for wrong in ({"temperature": 0.0}, {"top_p": 0.0}, {"top_k": -1}, {"face_target": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            TokenSampling(**wrong)


def test_shapes_that_cannot_be_used_are_refused(pipe: MeshAnythingPipeline) -> None:
    flat = CLOUD.copy()
    flat[3, 3:] = 0.5
    unbounded = CLOUD.copy()
    unbounded[0, 0] = np.inf
    cases: list[tuple[Any, str]] = [
        (CLOUD[:, :3], r"\[40, 3\]; normals are missing"), (flat, "1 of 40 have lengths"), (unbounded, "1 are not"),
        (np.tile(CLOUD[:1], (5, 1)), "no extent"), (trimesh.Trimesh(), "0 faces"), ([], "there is no shape"),
    ]  # fmt: skip
    for shape, message in cases:
        with pytest.raises(ValueError, match=message):
            pipe(shape)
    with pytest.raises(TypeError, match="got str"):
        pipe("chest.obj")
    with pytest.raises(ValueError, match="a point cloud has none"):
        pipe(CLOUD, shell_depth=5)


def test_faces_are_turned_by_the_normals_of_the_surface() -> None:
    ball = trimesh.creation.icosphere(2)
    wrong = np.array(ball.faces)
    wrong[::2] = wrong[::2, ::-1]
    turned = turned_faces(np.asarray(ball.vertices), wrong, np.asarray(ball.triangles_center), np.asarray(ball.face_normals))
    assert trimesh.Trimesh(ball.vertices, turned, process=False).volume == pytest.approx(ball.volume)


def test_a_shell_is_closed_and_near(pipe: MeshAnythingPipeline) -> None:
    open_box = trimesh.Trimesh(BOX.vertices + 3, BOX.faces[:-2], process=False)
    shell = surface_shell(open_box, 5)
    assert shell.is_watertight and not open_box.is_watertight
    np.testing.assert_allclose(shell.bounds, open_box.bounds, atol=0.2)
    assert 1 <= pipe(open_box, shell_depth=5, max_faces=2).reports[0].faces <= 2
    with pytest.raises(ValueError, match=r"4\.\.10, got 3"):
        surface_shell(open_box, 3)


def test_codes_become_faces() -> None:
    pipe = mesh_pipeline(codes=True)
    out = pipe(BOX, do_sample=True, generator=2)
    assert 1 <= out.reports[0].faces <= 6 and len(out.tokens[0]) % 9 == 0
    for options in ({"max_faces": 7}, {"max_tokens": 57}):
        with pytest.raises(ValueError, match="takes 6 faces, 56 ids, got"):
            pipe(BOX, **options)  # type: ignore[arg-type]
    ids = torch.tensor([[0, *range(3, 9), *range(3, 9), 1]])
    features = pipe.point_encoder(torch.from_numpy(CLOUD[None]).float())
    assert pipe.decode(ids, features)[0].dropped == 0 and pipe.decode(ids[:, :9], features)[0].problem == "there is no face"
    with pytest.raises(ValueError, match="illegal sequence: there is no face"):
        pipe.decode(ids[:, :9], features, "raise")
    with pytest.raises(ValueError, match="no preview"):
        pipe.preview(next(iter(pipe.iterate(BOX))))


def test_pipelines_are_saved_and_opened(pipe: MeshAnythingPipeline, tmp_path: Path) -> None:
    for name, own in (("v2", pipe), ("v1", mesh_pipeline(codes=True))):
        own.save_pretrained(tmp_path / name)
        found = GenPipeline.from_pretrained(tmp_path / name)
        assert isinstance(found, MeshAnythingPipeline)
        found.set_progress_bar_config(disable=True)
        np.testing.assert_array_equal(found(BOX, generator=1).tokens[0], own(BOX, generator=1).tokens[0])


@pytest.mark.parametrize("codes", [False, True], ids=["v2", "v1"])
def test_official_files_open_as_pipelines(codes: bool, tmp_path: Path) -> None:
    own = official_mesh_pipeline(codes)
    state = meshanything.to_official(own.transformer)
    state |= {f"point_encoder.{key}": value for key, value in michelangelo.to_official(own.point_encoder).items()}
    state |= mesh_vq.to_official(own.vq_model) if codes else {}
    file = tmp_path / ("MeshAnything_350m.pth" if codes else "model.safetensors")  # safetensors whatever the name says
    save_file({key: value.contiguous() for key, value in state.items()}, file)
    recognised = convert.recognise(tmp_path)
    assert recognised is not None and recognised[0] == "meshanything"
    found = GenPipeline.from_pretrained(tmp_path)
    assert isinstance(found, MeshAnythingPipeline) and found.config["num_points"] == (4096 if codes else 8192)
    found.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"max_tokens": 30, "do_sample": True, "generator": 4}
    np.testing.assert_array_equal(found(CLOUD, **options).tokens[0], own(CLOUD, **options).tokens[0])


def test_components_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="takes 5 tokens of width 16"):
        MeshAnythingPipeline(mesh_transformer(num_points=5), point_encoder())
    with pytest.raises(ValueError, match="vq_model belongs"):
        MeshAnythingPipeline(mesh_transformer(layout="faces", num_codes=7, code_dim=6), point_encoder())


def test_memory_is_estimated(pipe: MeshAnythingPipeline) -> None:
    assert pipe.estimate_memory(num_meshes=4).sampling == 4 * pipe.estimate_memory().sampling > 0
    assert pipe.estimate_memory(max_faces=1).sampling < pipe.estimate_memory().sampling


def test_sequences_end_at_the_first_special_id() -> None:
    sample = torch.tensor([[0, 5, 6, 1, 2], [0, 7, 8, 9, 10]])
    assert [row.tolist() for row in sequences(sample)] == [[2, 3], [4, 5, 6, 7]]
