"""The golden cases that a clone carries, and the machinery that compares them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from genkit.parity import base, certificate
from genkit.parity.base import Case, check_case, discover, formula_tensor
from genkit.parity.compare import compare, compare_tensor

GOLDENS = Path(__file__).parent / "goldens"
CASES = sorted(path.parent for path in GOLDENS.glob("*/*/config.json"))
SLOW = {"v2_official_size"}  # half a billion weights


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=f"{path.parent.name}/{path.name}", marks=[pytest.mark.slow] if path.name in SLOW else []) for path in CASES],
)
def test_golden_case(path: Path) -> None:
    result = check_case(Case(path))
    if result.status == "skipped":
        pytest.skip(result.reason)
    assert result.status == "ok", str(result)
    assert result.tensors


def toy(case: Case) -> dict[str, Tensor]:
    """A runner: twice the input plus the weight."""
    if case.config.get("broken"):
        raise ValueError("no such option")
    weight = case.weights({"w": (2,)}, lambda key, draws: 0.5 * draws)["w"]
    return {"y": 2 * case.inputs["x"] + case.place(weight), "unstored": case.inputs["x"]}


@pytest.fixture
def cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a good case, one without outputs, a broken one and one of an unknown system."""
    monkeypatch.setattr(base, "find_runner", lambda kind: toy if kind == "toy/double" else "no runner: genkit has no system yet")
    x = torch.arange(2.0)
    for name, config in (("good", {}), ("new", {}), ("broken", {"broken": True}), ("other", {"kind": "other/thing"})):
        folder = tmp_path / "cases" / "toy" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"kind": "toy/double", **config}))
        save_file({"x": x}, folder / "inputs.safetensors")
    good = tmp_path / "cases" / "toy" / "good"
    save_file({"y": 2 * x + 0.5 * formula_tensor("w", (2,)) + 1e-6}, good / "outputs.safetensors")
    (good / "tolerance.json").write_text(json.dumps({"default": {"rtol": 1e-4, "atol": 1e-5}, "rules": []}))
    return tmp_path / "cases"


def test_verify_prints_errors_saves_tensors_and_fails_on_a_broken_runner(
    cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert base.verify([cases], save=tmp_path / "out") == 1
    text = capsys.readouterr().out
    assert "ok       toy/good" in text
    assert re.search(r"ok   y: error \S+e-0[67], bound \S+e-05", text)
    assert "failed   toy/broken (toy/double" in text
    assert "ValueError: no such option" in text
    assert "skipped  toy/other" in text
    assert "1 ok, 1 failed, 1 skipped, 1 computed" in text
    assert sorted(path.name for path in (tmp_path / "out" / "toy").iterdir()) == ["good.safetensors", "new.safetensors"]
    assert load_file(tmp_path / "out" / "toy" / "new.safetensors").keys() == {"y", "unstored"}


def test_verify_passes_when_nothing_fails_and_speaks_json(cases: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert base.verify([cases / "toy" / "good", cases / "toy" / "other"], as_json=True) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["summary"]["ok"] == 1
    assert content["cases"][0]["tensors"][0]["ok"] is True


def test_a_case_computes_in_the_type_that_is_asked_for(cases: Path) -> None:
    result = check_case(Case(cases / "toy" / "good", dtype=torch.bfloat16))
    assert result.status == "failed"
    assert result.tensors[0].error > 1e-4


def test_a_folder_without_cases_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"kind": "no slash"}')
    with pytest.raises(FileNotFoundError, match="no case below"):
        discover(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        discover(tmp_path / "nowhere")


def test_kinds_without_a_runner_are_told_apart() -> None:
    assert base.find_runner("nosuch/thing") == "no runner: genkit has no system 'nosuch' yet"
    assert base.find_runner("base/verify") == "no runner: genkit has no system 'base' yet"


REFERENCE = {"y": torch.tensor([1.0, 10.0, 100.0]), "gap": torch.tensor([1.0, 0.0, 1.0]), "ids": torch.tensor([1, 2, 3])}


def verdict(name: str, error: Tensor, **rule: Any) -> bool:
    rules = [{"match": name[:-1] + "*", **rule}] if rule else []
    result = REFERENCE[name] + error
    return compare_tensor(result, REFERENCE, name, {"default": {"rtol": 0.0, "atol": 0.1}, "rules": rules}).ok


@pytest.mark.parametrize(
    ("rule", "error", "ok"),
    [
        ({}, [0.09, 0.09, 0.09], True),
        ({}, [0.0, 0.0, 0.11], False),
        ({"rtol": 0.01}, [0.05, 0.15, 1.05], True),
        ({"rtol": 0.01, "atol": 0.0}, [0.05, 0.0, 0.0], False),
        ({"atol_of_max": 0.01}, [1.05, 0.0, 0.0], True),
        ({"atol_of_max": 0.01}, [1.15, 0.0, 0.0], False),
        ({"norm": 0.01}, [0.9, 0.0, 0.0], True),
        ({"norm": 0.01}, [1.1, 0.0, 0.0], False),
        ({"norm": 0.01, "atol": 0.5}, [0.9, 0.0, 0.0], False),
        ({"norm": 0.001, "atol": 5.0}, [0.9, 0.0, 0.0], False),
        ({"outside": 0.34}, [9.0, 0.0, 0.0], True),
        ({"outside": 0.33}, [9.0, 0.0, 0.0], False),
        ({"where": {"tensor": "gap", "above": 0.5}}, [0.0, 9.0, 0.0], True),
        ({"where": {"tensor": "gap", "above": 0.5}}, [0.0, 0.0, 9.0], False),
        ({"exact": True}, [0.0, 0.0, 0.01], False),
        ({}, [torch.nan, 0.0, 0.0], False),
        ({}, [torch.inf, 0.0, 0.0], False),
        ({"outside": 0.5}, [torch.nan, 0.0, 0.0], True),
    ],
)
def test_each_rule_means_what_it_says(rule: dict[str, Any], error: list[float], ok: bool) -> None:
    assert verdict("y", torch.tensor(error), **rule) is ok


def test_integers_are_exact_unless_a_bound_is_named() -> None:
    off = torch.tensor([0, 0, 1])
    assert not verdict("ids", off)
    assert verdict("ids", off, atol=1.0)
    assert verdict("ids", torch.tensor([0, 0, 0]))


def test_missing_misshapen_and_skipped_tensors() -> None:
    tolerance = {"default": {"rtol": 0.0, "atol": 0.0}, "rules": [{"match": "gap", "skip": "not ours"}]}
    checks = {check.name: check for check in compare({"y": torch.zeros(2)}, REFERENCE, tolerance)}
    assert checks["gap"].ok
    assert "not ours" in checks["gap"].note
    assert not checks["ids"].ok
    assert "missing" in checks["ids"].note
    assert "[2], expected [3]" in checks["y"].note


def test_nan_and_infinity_must_sit_at_the_same_places() -> None:
    reference = {"y": torch.tensor([torch.nan, torch.inf, 1.0])}
    tolerance = {"default": {"rtol": 0.0, "atol": 1e9}, "rules": []}
    assert compare_tensor(reference["y"].clone(), reference, "y", tolerance).ok
    for wrong in ([0.0, torch.inf, 1.0], [torch.nan, -torch.inf, 1.0], [torch.nan, torch.inf, torch.nan]):
        assert not compare_tensor(torch.tensor(wrong), reference, "y", tolerance).ok


def test_a_certificate_of_a_pixel_model(tmp_path: Path) -> None:
    from genkit.generators.edm import EDMUNet2DModel
    from genkit.pipelines.edm import EDMPipeline
    from genkit.schedulers.edm_heun import EDMHeunScheduler

    sizes = {"name": "song", "model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
    pipe = EDMPipeline(EDMUNet2DModel(sample_size=8, label_dim=0, unet_config=sizes).eval(), EDMHeunScheduler(), num_inference_steps=2)
    pipe.save_pretrained(tmp_path)
    certificate.write(tmp_path, [{"num_images_per_prompt": 2, "generator": [1, 2]}])
    assert certificate.check(tmp_path).status == "ok"


@pytest.mark.parametrize("kind", ["shapes", "artist meshes"])
def test_a_certificate_of_meshes_takes_a_mesh_and_notices_a_change(kind: str, tmp_path: Path) -> None:
    import trimesh

    from genkit.pipelines.shape_reconstruction import ShapeReconstructionPipeline
    from tests.generators.toy_meshes import mesh_pipeline
    from tests.pipelines.toy_shapes import ball_vae

    box = trimesh.creation.box((1, 2, 3))
    pipe: Any = ShapeReconstructionPipeline(ball_vae(), octree_resolution=16) if kind == "shapes" else mesh_pipeline()
    argument, weight = ("mesh", "vae.pre_kl.bias") if kind == "shapes" else ("shape", "transformer.lm_head.weight")
    pipe.save_pretrained(tmp_path)
    certificate.write(tmp_path, [{argument: box, "generator": [1]}])
    found = certificate.check(tmp_path)
    assert found.status == "ok" and len(found.tensors) == 2 and not any("given" in item.name for item in found.tensors)
    part, parameter = weight.split(".", 1)
    torch.nn.init.normal_(getattr(pipe, part).get_parameter(parameter))
    pipe.save_pretrained(tmp_path)
    assert certificate.check(tmp_path).status == "failed"


def test_a_certificate_proves_the_model_and_notices_a_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from genkit.generators.enat import ENATTransformer2DModel
    from genkit.pipelines.enat import ENATPipeline
    from genkit.schedulers.masked_token import MaskedTokenScheduler
    from genkit.tokenizers.vit_vqgan import ViTVQModel

    torch.manual_seed(0)
    tower = {"dim": 16, "depth": 1, "heads": 2, "mlp_dim": 16, "dim_head": 8}
    quantizer = {"name": "simvq", "codebook_size": 8, "dim": 4}
    pipe = ENATPipeline(
        ENATTransformer2DModel(
            sample_size=4, hidden_size=16, num_heads=2, num_encoder_layers=1, num_decoder_layers=1, codebook_size=8, num_classes=2
        ).eval(),
        ViTVQModel(patch_size=2, encoder_config=tower, decoder_config=tower, quantizer_config=quantizer).eval(),
        MaskedTokenScheduler(mask_token_id=8),
    )
    pipe.save_pretrained(tmp_path)
    certificate.write(tmp_path, [{"prompt": [0, 1], "generator": [1, 2]}, {"prompt": 1, "generator": [3], "num_inference_steps": 2}])
    assert certificate.verify(tmp_path) == 0
    assert "0.tokens" in capsys.readouterr().out
    torch.nn.init.normal_(pipe.transformer.head.bias)
    pipe.save_pretrained(tmp_path)
    assert certificate.check(tmp_path).status == "failed"
    with pytest.raises(ValueError, match="one per picture"):
        certificate.write(tmp_path, [{"prompt": 0}])
    (tmp_path / certificate.FILE).unlink()
    with pytest.raises(FileNotFoundError, match="only packaged models"):
        certificate.check(tmp_path)
