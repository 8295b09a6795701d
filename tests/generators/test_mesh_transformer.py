"""The mesh transformer, the point encoder and the mesh VAE: causality, caches, sets, the way to official files and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from genkit.convert import mesh_vq, meshanything, michelangelo
from genkit.generators.mesh_stepper import MeshStepper
from genkit.generators.mesh_transformer import MeshTransformer
from genkit.tokenizers.mesh_vae import MeshVQModel
from genkit.tokenizers.point_encoder import PointEncoder, PointFeatures
from genkit.weights import read_safetensors
from tests.generators.toy_meshes import CODES, DECODER, POINTS, SIZES, mesh_decoder, mesh_transformer, point_encoder

GOLDENS = Path(__file__).parent.parent / "parity/goldens/meshanything"


def ids_and_prefix(model: MeshTransformer, length: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, model.num_ids, (2, length), generator=generator)
    ids[:, 0] = 0
    return ids, torch.randn(2, 4, 16, generator=generator)


@pytest.fixture(params=[{}, CODES], ids=["coordinates", "codes"])
def model(request: pytest.FixtureRequest) -> MeshTransformer:
    return mesh_transformer(**request.param)


def test_a_late_id_changes_no_early_logit(model: MeshTransformer) -> None:
    ids, prefix = ids_and_prefix(model)
    changed = ids.clone()
    changed[:, 8:] = 5
    before, after = (model(x, prefix).logits for x in (ids, changed))
    assert torch.equal(before[:, : 4 + 8], after[:, : 4 + 8])
    assert not torch.equal(before[:, 4 + 8 :], after[:, 4 + 8 :])


@pytest.mark.parametrize("cuts", [[12], [1] * 12, [5, 1, 6], [0, 12]])
def test_chunks_through_the_cache_give_one_pass(model: MeshTransformer, cuts: list[int]) -> None:
    ids, prefix = ids_and_prefix(model)
    whole, slots = model(ids, prefix).logits, model.tokens.slots(ids)
    cache, parts, start = model.new_cache(2, 16), [], 0
    for i, cut in enumerate(cuts):
        part = slice(start, start + cut)
        options: dict[str, Any] = {"slots": slots[:, part], "cache": cache, "start": 0 if i == 0 else 4 + start}
        parts.append(model(ids[:, part], prefix if i == 0 else None, **options).logits)
        start += cut
    assert_close(torch.cat(parts, dim=1), whole, atol=2e-5, rtol=1e-4)


def test_the_stepper_gives_the_modules_numbers(model: MeshTransformer) -> None:
    ids, prefix = ids_and_prefix(model)
    whole, slots = model(ids, prefix).logits, model.tokens.slots(ids)
    cache, stepper = model.new_cache(2, 16), MeshStepper(model)
    model(ids[:, :2], prefix, slots=slots[:, :2], cache=cache)
    for t in range(2, 12):
        logits = stepper(ids[:, t : t + 1], slots[:, t : t + 1], 4 + t, cache)
        assert_close(logits, whole[:, 4 + t], atol=2e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="place 64 is asked for, the model has 64"):
        stepper(ids[:, :1], slots[:, :1], 64, cache)


def test_padding_and_neighbours_change_nothing(model: MeshTransformer) -> None:
    ids, prefix = ids_and_prefix(model)
    padded = torch.nn.functional.pad(ids[:1], (0, 5), value=2)
    assert_close(model(padded, prefix[:1]).logits[:, :16], model(ids, prefix).logits[:1], atol=2e-5, rtol=1e-4)


def test_wrong_calls_are_refused(model: MeshTransformer) -> None:
    ids, prefix = ids_and_prefix(model)
    with pytest.raises(ValueError, match="slots"):
        model(ids)
    with pytest.raises(ValueError, match="65 places are asked for, the model has 64"):
        model(torch.zeros(2, 61, dtype=torch.long), prefix)
    for options in ({"heads": 3}, {"num_codes": 4}, {"num_positions": 10}):
        with pytest.raises(ValueError, match=next(iter(options))):
            MeshTransformer(**{**SIZES, **options})


def test_bf16_checkpointing_and_compile(model: MeshTransformer) -> None:
    ids, prefix = ids_and_prefix(model)
    whole = model(ids, prefix).logits
    half = mesh_transformer(**({} if model.codebook is None else CODES)).to(torch.bfloat16)
    assert_close(half(ids, prefix.bfloat16()).logits.float(), whole, atol=0.3, rtol=0.1)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(ids, prefix).logits, whole, atol=2e-5, rtol=1e-4)
    model.requires_grad_(True).train()
    model.enable_gradient_checkpointing()
    out = model(ids, prefix).logits
    assert_close(out, whole, atol=2e-5, rtol=1e-4)
    out.sum().backward()
    unused = {"cond_head_proj.weight", "cond_head_proj.bias", "cond_proj.weight", "cond_proj.bias"}  # make the prefix
    assert {name for name, p in model.named_parameters() if p.grad is None} == unused


def test_dropout_is_for_training() -> None:
    model = mesh_transformer(dropout=0.5)
    ids, prefix = ids_and_prefix(model)
    assert torch.equal(model(ids, prefix).logits, model(ids, prefix).logits)
    model.train()
    assert not torch.equal(model(ids, prefix).logits, model(ids, prefix).logits)


def test_points_are_a_set() -> None:
    encoder, points = point_encoder(), torch.randn(2, 30, 6)
    out = encoder(points)
    assert out.tokens.shape == (2, 4, 16) and out.shape_tokens.shape == (2, 3, 16)
    assert_close(encoder(points[:, torch.randperm(30)]).tokens, out.tokens, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="d=6"):
        encoder(points[..., :3])
    with pytest.raises(ValueError, match="heads must divide"):
        PointEncoder(**{**POINTS, "heads": 3})


# ---- the mesh VAE ----


def features() -> PointFeatures:
    generator = torch.Generator().manual_seed(4)
    return PointFeatures(tokens=torch.randn(2, 4, 16, generator=generator), shape_tokens=torch.randn(2, 3, 16, generator=generator))


def test_padding_changes_nothing_unless_as_released() -> None:
    codes = torch.randint(0, 7, (2, 27))
    for official in (False, True):
        decoder = mesh_decoder(official_padding=official)
        padded = torch.nn.functional.pad(codes, (0, 9), value=-1)
        assert_close(decoder.decode(padded, features()).logits[:, :3], decoder.decode(codes, features()).logits, atol=2e-5, rtol=1e-4)
    shorter, longer = (mesh_decoder(num_faces=n, num_positions=8, official_padding=True) for n in (4, 8))
    longer.load_state_dict(shorter.state_dict())
    difference = shorter.decode(codes, features()).logits - longer.decode(codes, features()).logits
    assert difference.abs().max() > 1e-4, "the released decoder sees its padding"


def test_an_invalid_face_is_not_there() -> None:
    decoder, codes = mesh_decoder(), torch.randint(0, 7, (2, 18))
    codes[0, 13] = -1
    out = decoder.decode(codes, features())
    assert out.valid.tolist() == [[True, False], [True, True]]
    assert (out.steps[0, 1] == -1).all() and (out.steps[0, 0] >= 0).all()
    other = codes.clone()
    other[0, 14] = (codes[0, 14] + 1) % 7
    assert torch.equal(decoder.decode(other, features()).logits, out.logits)


def test_faces_become_codes_and_faces_again() -> None:
    torch.manual_seed(0)
    model = MeshVQModel(**DECODER, encoder_depth=1).train()
    steps = torch.randint(0, 128, (2, 3, 3, 3))
    steps[1, 2] = -1
    decoded, found = model(steps, features())
    assert decoded.logits.shape == (2, 3, 9, 128) and found.indices.shape == (2, 27)
    assert (found.indices[1, 18:] == -1).all() and (found.indices[0] >= 0).all()
    alone = model.encode(steps[1:, :2])
    assert torch.equal(alone.indices, found.indices[1:, :18]), "faces that are not there change nothing"
    (decoded.logits.sum() + found.loss).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    with pytest.raises(ValueError, match="7 faces are more than num_faces=6"):
        model.encode(torch.zeros(1, 7, 3, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="decoder only"):
        mesh_decoder().encode(steps)


# ---- official files ----


def test_official_files_come_back_as_they_were() -> None:
    for name, heads, points in (("v2_full_tiny", 4, 4), ("v1_full_tiny", 4, 3)):
        state = read_safetensors(GOLDENS / name / "weights.safetensors")
        options = {"max_tokens": 65} if name.startswith("v1") else {}
        net, report = meshanything.from_official(state, heads=heads, **options)
        again = meshanything.to_official(net)
        encoder, _ = michelangelo.from_official(state, heads=points)
        again |= {f"point_encoder.{key}": value for key, value in michelangelo.to_official(encoder).items()}
        if name.startswith("v1"):
            again |= mesh_vq.to_official(mesh_vq.from_official(state, heads=4, num_faces=7)[0])
        lost = {key for key in state if key not in again}
        assert lost == {key for key in state if ".geo_decoder." in key}
        for key, value in again.items():
            if key in state and not key.endswith(("shape_projection", "embed_tokens.weight")):
                assert torch.equal(value, state[key]), key
        assert any(key.startswith("point_encoder.") for key in report.dropped)


def test_either_name_of_the_tied_table_will_do() -> None:
    state = read_safetensors(GOLDENS / "v2_full_tiny" / "weights.safetensors")
    one = meshanything.from_official(state, heads=4)[0].lm_head.weight
    head, table = "transformer.lm_head.weight", "transformer.model.decoder.embed_tokens.weight"
    assert torch.equal(meshanything.from_official({**state, table: state[head]}, heads=4)[0].lm_head.weight, one)
    renamed = {**state, table: state[head]}
    del renamed[head]
    assert torch.equal(meshanything.from_official(renamed, heads=4)[0].lm_head.weight, one)


def test_published_sizes_have_the_published_numbers_of_weights() -> None:
    with torch.device("meta"):
        v2, encoder = MeshTransformer(), PointEncoder()
        v1 = MeshTransformer(layout="faces", num_codes=8192, code_dim=1024, max_tokens=7202, num_positions=18259)
        decoder = MeshVQModel(num_positions=18000)

    def count(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    prefix = 2_361_344
    assert count(v2) - prefix == 313_047_040
    assert count(v1) - prefix + 8195 * 1024 == 347_247_616  # with the table that nothing uses
    assert count(decoder) - 8192 * 1024 == 60_978_816
    unused = 768 * 768 + 7_129_345  # projection to CLIP's space, field
    assert count(encoder) + unused == 185_249_409
    assert count(v2) + count(encoder) + unused == 500_657_793
    assert count(v1) + 8195 * 1024 + count(encoder) + unused + count(decoder) - 8192 * 1024 == 595_837_185
