"""Saving and opening pipelines: format on disk, names, shared components, official files, every kind of damage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import genkit.catalogue
import genkit.paths
from genkit import ENATPipeline, GenPipeline, convert
from genkit.pipelines import loading
from genkit.schedulers.masked_token import MaskedTokenScheduler

from .conftest import CODES, make_class_pipe, make_text_pipe, make_vqvae


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("saved")
    make_class_pipe().save_pretrained(root / "class")
    make_text_pipe().save_pretrained(root / "text")
    return {"class": root / "class", "text": root / "text"}


@pytest.fixture
def folder(saved: dict[str, Path], tmp_path: Path) -> Path:
    shutil.copytree(saved["class"], tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def package(saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with one model whose text encoder is shared."""
    root = tmp_path / "pretrained"
    for name in ("text_encoder", "tokenizer"):
        shutil.copytree(saved["text"] / name, root / "text-tiny" / name)
    monkeypatch.setattr(genkit.catalogue, "pretrained_dir", lambda: root)
    shared = {"text_encoder": "text-tiny/text_encoder", "tokenizer": "text-tiny/tokenizer"}
    make_text_pipe().save_pretrained(root / "enat-tiny", shared=shared)
    genkit.catalogue.write_sidecar(root / "enat-tiny", summary="tiny", licence="CC0-1.0", parameters=1000, memory_mb=1.5)
    return root


def tokens(pipe: Any, prompt: str) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    result: torch.Tensor = pipe(prompt, generator=[1], num_inference_steps=3).tokens
    return result


def edit(path: Path, **changes: Any) -> None:
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "DELETE"}))


@pytest.mark.parametrize("kind", ["class", "text"])
def test_a_saved_pipeline_opens_to_the_same_pictures(kind: str, saved: dict[str, Path], request: pytest.FixtureRequest) -> None:
    pipe = GenPipeline.from_pretrained(saved[kind])
    assert type(pipe) is ENATPipeline
    assert not pipe.transformer.training
    torch.testing.assert_close(tokens(pipe, "bed"), tokens(request.getfixturevalue(f"{kind}_pipe"), "bed"), rtol=0, atol=0)


def test_components_of_ours_are_named_without_a_module_path(saved: dict[str, Path], tmp_path: Path) -> None:
    pipe = GenPipeline.from_pretrained(saved["text"])
    pipe.vqvae = make_vqvae()
    pipe.scheduler = MaskedTokenScheduler(mask_token_id=CODES)
    pipe.save_pretrained(tmp_path / "again")
    for folder in (saved["text"], tmp_path / "again"):
        index = json.loads((folder / "model_index.json").read_text())
        assert index["_class_name"] == "ENATPipeline"
        assert index["transformer"] == ["genkit", "ENATTransformer2DModel"]
        assert index["vqvae"] == ["genkit", "ViTVQModel"]
        assert index["scheduler"] == ["genkit", "MaskedTokenScheduler"]
        assert index["text_encoder"] == ["transformers", "CLIPTextModelWithProjection"]
        assert not [path for path in folder.rglob("*") if path.is_file() and str(tmp_path.parent).encode() in path.read_bytes()]
        assert not list(folder.rglob("*.bin"))


def test_settings_and_components_can_be_replaced(saved: dict[str, Path]) -> None:
    scheduler = MaskedTokenScheduler(mask_token_id=CODES, guidance="constant")
    pipe = GenPipeline.from_pretrained(saved["class"], scheduler=scheduler, num_inference_steps=2)
    assert pipe.scheduler is scheduler
    assert pipe.config["num_inference_steps"] == 2
    with pytest.raises(TypeError, match="Did you mean 'scheduler'"):
        GenPipeline.from_pretrained(saved["class"], schedular=scheduler)
    with pytest.raises(TypeError, match="revision"):
        GenPipeline.from_pretrained(saved["class"], revision="main")


def test_dtype_and_device_are_as_asked(saved: dict[str, Path]) -> None:
    assert GenPipeline.from_pretrained(saved["text"]).text_encoder.dtype == torch.float32
    pipe = GenPipeline.from_pretrained(saved["text"], torch_dtype=torch.bfloat16, device="cpu")
    assert pipe.transformer.dtype == pipe.text_encoder.dtype == torch.bfloat16


def test_half_precision_files_open_in_single_precision(tmp_path: Path) -> None:
    make_text_pipe().to(torch.float16).save_pretrained(tmp_path / "half")
    pipe = GenPipeline.from_pretrained(tmp_path / "half")
    assert {module.dtype for module in (pipe.transformer, pipe.vqvae, pipe.text_encoder)} == {torch.float32}


def test_a_shared_component_is_stored_once_and_found_again(package: Path, tmp_path: Path) -> None:
    assert not (package / "enat-tiny" / "text_encoder").exists()
    pipe = GenPipeline.from_pretrained("genkit/enat-tiny")
    torch.testing.assert_close(tokens(pipe, "red bed"), tokens(make_text_pipe(), "red bed"), rtol=0, atol=0)
    pipe.save_pretrained(tmp_path / "alone")
    shutil.rmtree(package / "text-tiny")
    assert "_shared" not in json.loads((tmp_path / "alone" / "model_index.json").read_text())
    torch.testing.assert_close(tokens(GenPipeline.from_pretrained(tmp_path / "alone"), "bed"), tokens(pipe, "bed"), rtol=0, atol=0)


def test_a_shared_name_cannot_leave_the_package(package: Path) -> None:
    edit(package / "enat-tiny" / "model_index.json", _shared={"text_encoder": "../../etc", "tokenizer": "text-tiny/tokenizer"})
    with pytest.raises(ValueError, match=r"shared component '\.\./\.\./etc'"):
        GenPipeline.from_pretrained("genkit/enat-tiny")


def test_the_catalogue_lists_packaged_models(package: Path) -> None:
    (entry,) = genkit.catalogue.list_models(official=False)
    assert (entry.name, entry.pipeline, entry.summary, entry.licence) == ("genkit/enat-tiny", "ENATPipeline", "tiny", "CC0-1.0")
    shared = sum(path.stat().st_size for path in package.rglob("*") if path.is_file())
    assert entry.size_mb == pytest.approx(shared / 1e6)


def test_an_unknown_packaged_name_names_the_nearest(package: Path) -> None:
    with pytest.raises(ValueError, match="Did you mean 'genkit/enat-tiny'"):
        GenPipeline.from_pretrained("genkit/enat-tin")


def test_a_wrong_path_and_a_hub_id_without_network_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="neither a packaged model"):
        GenPipeline.from_pretrained(str(tmp_path / "nothing"))
    with pytest.raises(OSError, match="not in the local cache"):
        GenPipeline.from_pretrained("nobody/nothing", cache_dir=tmp_path, local_files_only=True)


def test_a_hub_id_opens_from_the_hub_cache(saved: dict[str, Path], tmp_path: Path) -> None:
    repo = tmp_path / "models--me--enat"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("a" * 40)
    shutil.copytree(saved["class"], repo / "snapshots" / ("a" * 40))
    pipe = GenPipeline.from_pretrained("me/enat", cache_dir=tmp_path, local_files_only=True)
    assert type(pipe) is ENATPipeline


def official_file(path: Path) -> Path:
    """An ENAT checkpoint as its authors write it."""
    torch.save({"module." + key: value for key, value in convert.export("enat", make_class_pipe().transformer).items()}, path)
    return path


def test_an_official_file_is_recognised_and_converted(tmp_path: Path, class_pipe: ENATPipeline) -> None:
    path = official_file(tmp_path / "nnet_ema.pth")
    options: dict[str, Any] = {"num_heads": 3, "num_decoder_layers": 2, "sample_size": [6, 4]}
    with pytest.raises(ValueError, match=r"also pass vqvae=\.\.\."):
        GenPipeline.from_pretrained(path, **options)
    for source in (path, tmp_path):
        pipe = GenPipeline.from_pretrained(source, vqvae=class_pipe.vqvae, **options)
        pipe.set_progress_bar_config(disable=True)
        torch.testing.assert_close(
            pipe("1", generator=[1], num_inference_steps=3).tokens, tokens(class_pipe, "wooden table"), rtol=0, atol=0
        )
    with pytest.raises(TypeError, match="Did you mean 'num_heads'"):
        GenPipeline.from_pretrained(path, vqvae=class_pipe.vqvae, num_head=3)


def test_a_folder_of_one_component_says_how_to_open_it(saved: dict[str, Path]) -> None:
    with pytest.raises(FileNotFoundError, match=r"ENATTransformer2DModel\.from_pretrained"):
        GenPipeline.from_pretrained(saved["class"] / "transformer")


def weights(folder: Path) -> Path:
    return folder / "transformer" / "diffusion_pytorch_model.safetensors"


def rewrite(folder: Path, change: Any) -> None:
    state = load_file(weights(folder))
    change(state)
    save_file(state, weights(folder))


KEY = "blocks.0.branches.0.f.q.weight"
DAMAGES: dict[str, tuple[Any, str]] = {
    "missing tensor": (lambda f: rewrite(f, lambda s: s.pop(KEY)), rf"1 missing: {KEY}"),
    "unexpected tensor": (lambda f: rewrite(f, lambda s: s.update(extra=torch.zeros(1))), r"1 unexpected: extra"),
    "misshapen tensor": (
        lambda f: rewrite(f, lambda s: s.update({KEY: torch.zeros(5, 24)})),
        rf"{KEY} expected \[24, 24\], found \[5, 24\]",
    ),
    "non-finite weight": (lambda f: rewrite(f, lambda s: s[KEY].__setitem__((0, 0), torch.nan)), f"NaN or infinity in 1 of .*{KEY}"),
    "truncated file": (lambda f: weights(f).write_bytes(weights(f).read_bytes()[:-10]), "truncated or corrupt"),
    "truncated header": (lambda f: weights(f).write_bytes(weights(f).read_bytes()[:100]), "truncated"),
    "empty file": (lambda f: weights(f).write_bytes(b""), "empty"),
    "web page": (lambda f: weights(f).write_text("<!DOCTYPE html><html>"), "web page"),
    "pickle under a safetensors name": (lambda f: torch.save({}, weights(f)), "pickles are not opened"),
    "pickle instead": (lambda f: weights(f).rename(weights(f).with_suffix(".bin")), "pickled weights only"),
    "no weights": (lambda f: weights(f).unlink(), "no weights"),
    "no component folder": (lambda f: shutil.rmtree(f / "vqvae"), "does not exist"),
    "unknown config key": (lambda f: edit(f / "transformer" / "config.json", hidden_sise=3), "Did you mean 'hidden_size'"),
    "impossible config value": (lambda f: edit(f / "transformer" / "config.json", num_heads=5), "divisible by num_heads"),
    "impossible scheduler value": (lambda f: edit(f / "scheduler" / "scheduler_config.json", rule="x"), "unknown masking rule"),
    "broken config": (lambda f: (f / "transformer" / "config.json").write_text("{"), "not valid JSON"),
    "no config": (lambda f: (f / "scheduler" / "scheduler_config.json").unlink(), "does not exist"),
    "unknown scheduler key": (lambda f: edit(f / "scheduler" / "scheduler_config.json", rul="x"), "Did you mean 'rule'"),
    "broken index": (lambda f: (f / "model_index.json").write_text("["), "not valid JSON"),
    "unknown pipeline": (lambda f: edit(f / "model_index.json", _class_name="ENATPipelin"), "Did you mean 'ENATPipeline'"),
    "no class name": (lambda f: edit(f / "model_index.json", _class_name=3), "names no pipeline class"),
    "unknown index key": (lambda f: edit(f / "model_index.json", guidance=3), "Did you mean 'guidance_scale'"),
    "absent component": (lambda f: edit(f / "model_index.json", vqvae="DELETE"), "lacks vqvae"),
    "foreign code": (lambda f: edit(f / "model_index.json", vqvae=["os", "system"]), "foreign code is not run"),
    "unknown class": (lambda f: edit(f / "model_index.json", vqvae=["genkit", "ViTVQModell"]), "Did you mean 'ViTVQModel'"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_one_clear_error_that_names_the_file(damage: str, folder: Path) -> None:
    change, text = DAMAGES[damage]
    change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=text) as caught:
        GenPipeline.from_pretrained(folder)
    assert str(folder) in str(caught.value)


def test_damage_in_a_transformers_component_is_an_error_too(saved: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(saved["text"], tmp_path / "model")
    file = tmp_path / "model" / "text_encoder" / "model.safetensors"
    state = load_file(file)
    state["text_projection.weight"] = torch.zeros(3, 3)
    state.pop("text_model.final_layer_norm.bias")
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"text_encoder.*missing: text_model.final_layer_norm.bias.*text_projection.weight expected \[12, 16\]"
    ):
        GenPipeline.from_pretrained(tmp_path / "model")


def test_the_concrete_class_opens_only_its_own_models(saved: dict[str, Path]) -> None:
    class Other(GenPipeline):
        pass

    with pytest.raises(ValueError, match="is a ENATPipeline"):
        Other.from_pretrained(saved["class"])


def test_saving_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = make_class_pipe()

    def fail(*args: Any, **options: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(type(pipe.vqvae), "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        pipe.save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="pickles"):
        pipe.save_pretrained(tmp_path / "model", safe_serialization=False)


def test_sharded_weights_open_and_a_missing_shard_is_named(tmp_path: Path) -> None:
    pipe = make_class_pipe()
    pipe.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    shards = sorted((tmp_path / "model" / "transformer").glob("*.safetensors"))
    assert len(shards) > 1
    torch.testing.assert_close(tokens(GenPipeline.from_pretrained(tmp_path / "model"), "bed"), tokens(pipe, "bed"), rtol=0, atol=0)
    shards[0].unlink()
    with pytest.raises(FileNotFoundError, match=shards[0].name):
        GenPipeline.from_pretrained(tmp_path / "model")


def test_loading_restores_the_settings_of_transformers_logging(saved: dict[str, Path]) -> None:
    from transformers.utils import logging

    before = (logging.is_progress_bar_enabled(), logging.get_verbosity())
    with loading.quiet():
        pass
    assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == before
