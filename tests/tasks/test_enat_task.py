"""The ENAT training task: masks, losses, data, and which network learns what."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from genkit.blocks.lora import LoRAWeights
from genkit.blocks.pruning import pruned
from genkit.conditioners.text import EncodedText, encode_text
from genkit.data.tokens import TokenCache
from genkit.generators.enat import ENATTransformer2DModel
from genkit.pipelines.base import GenPipeline
from genkit.pipelines.outputs import ImageOutput
from genkit.tasks import _prompts, enat
from genkit.tasks._codes import FakeQuantConfig, LoRAConfig
from genkit.tasks._enat_masking import mask_count, mask_more, masked_cross_entropy, random_mask
from genkit.tasks._prompts import build_prompt_table
from genkit.tasks.text_encoder import train_tokenizer
from genkit.tokenizers.vit_vqgan import ViTVQModel
from genkit.training.config import TrainConfig
from genkit.training.loop import Trainer
from genkit.training.task import Phase, StepContext
from tests.data.toy import strips, write_views

CODES, NUM_VIEWS = 8, 12
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Views, a tokenizer of pictures and a text encoder with its tokenizer."""
    root = tmp_path_factory.mktemp("enat")
    write_views(root / "train.parquet", list(strips()))
    torch.manual_seed(0)
    tower = {"dim": 16, "depth": 1, "heads": 1, "mlp_dim": 16, "dim_head": 16}
    codes = {"name": "simvq", "codebook_size": CODES, "dim": 4}
    vqvae = ViTVQModel(patch_size=2, encoder_config=tower, decoder_config=tower, quantizer_config=codes, sample_size=8)
    vqvae.save_pretrained(root / "vqvae")
    tokenizer = train_tokenizer(["a golden chest", "a table"], 260, 8)
    tokenizer.save_pretrained(root / "tokenizer")
    sizes = {"hidden_size": 12, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 6}
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = CLIPTextModelWithProjection(CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=8, **sizes, **ids))
    text.save_pretrained(root / "text_encoder")
    return root


def build(folders: Path, text: bool = False, **options: Any) -> enat.ENATTask:
    """A task whose network has random modulation, so that conditions matter."""
    model = enat.ModelConfig(hidden_size=16, num_heads=2, num_encoder_layers=1, num_decoder_layers=1)
    names: dict[str, Any] = {"text_encoder": str(folders / "text_encoder"), "tokenizer": str(folders / "tokenizer")} if text else {}
    settings: dict[str, Any] = (
        {"image_size": 8, "prompts_per_picture": 3, "cache": str(folders / "cache"), "model": model} | names | options
    )
    task = enat.build(enat.Config(vqvae=str(folders / "vqvae"), data=str(folders / "train.parquet"), **settings))
    torch.manual_seed(1)
    for parameter in task.modules["transformer"].parameters():
        parameter.data.add_(torch.randn(parameter.shape) * 0.2)
    return task


def run_step(task: enat.ENATTask, rows: slice = slice(0, 6), step: int = 0, **context: Any) -> tuple[Phase, Any]:
    """One step on rows of the data; returns its phase and the averaged network."""
    data = cast(TokenCache, task.dataset())
    batch = {"indices": data.indices(rows), "index": torch.arange(len(data))[rows]}
    average = copy.deepcopy(task.modules["transformer"]).eval().requires_grad_(False)
    ctx = StepContext(step, 5, CPU, {"transformer": average}, **context)
    (phase,) = list(task.step(batch, ctx))
    return phase, average


def test_mask_count_is_rounded_and_leaves_something_on_both_sides() -> None:
    assert [mask_count(ratio, 16) for ratio in (0.0, 0.01, 0.5, 0.83, 1.0)] == [1, 1, 8, 13, 15]


def test_random_mask_compares_the_sort_order() -> None:
    uniforms = torch.tensor([[0.9, 0.1, 0.5, 0.3]])  # sort order 1, 3, 2, 0
    assert random_mask(uniforms, 2).tolist() == [[True, False, False, True]]
    assert random_mask(torch.rand(5, 16), 7).sum(1).tolist() == [7] * 5


def test_earlier_grid_masks_exactly_so_many_more_and_keeps_the_masked() -> None:
    ids = torch.tensor([[1, 8, 2, 3, 8, 4]])
    uniforms = torch.tensor([[0.5, 0.0, 0.1, 0.9, 0.0, 0.3]])
    assert mask_more(ids, uniforms, 2, 8).tolist() == [[1, 8, 8, 3, 8, 8]]
    assert torch.equal(mask_more(ids, uniforms, 0, 8), ids)
    assert mask_more(ids, uniforms, 4, 8).tolist() == [[8] * 6]


def test_smoothed_loss_spreads_over_all_codes() -> None:
    logits, targets = torch.randn(2, 3, CODES), torch.randint(CODES, (2, 3))
    log_probs = logits.log_softmax(-1)
    expected = -(0.9 * log_probs.gather(-1, targets[..., None]).squeeze(-1) + 0.1 * log_probs.mean(-1)).mean()
    torch.testing.assert_close(masked_cross_entropy(logits, targets, 0.1), expected, rtol=1e-6, atol=1e-6)
    assert masked_cross_entropy(logits.bfloat16(), targets).dtype == torch.float32


def test_beta_draw_has_the_published_mean_and_follows_the_seed() -> None:
    draws = [enat.draw_beta((12, 3), i) for i in range(2000)]
    assert abs(sum(draws) / len(draws) - 0.8) < 0.01
    assert draws[0] == enat.draw_beta((12, 3), 0)


@pytest.mark.parametrize("text", [False, True])
def test_tokens_and_prompts_are_written_once_and_mapped(folders: Path, text: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cast(TokenCache, build(folders, text).dataset())
    assert len(first) == NUM_VIEWS
    assert first.codes.dtype == "uint16"
    again = build(folders, text)
    monkeypatch.setattr(again.frozen["vqvae"], "encode", lambda pictures: pytest.fail("encoded again"))
    monkeypatch.setattr(_prompts, "encode_text", lambda *args: pytest.fail("encoded again"))
    assert torch.equal(cast(TokenCache, again.dataset()).indices(slice(0, NUM_VIEWS)), first.indices(slice(0, NUM_VIEWS)))


def test_tokens_are_the_codes_of_the_pictures_and_their_mirror_images(folders: Path) -> None:
    task = build(folders, flip=True)
    data, vqvae = task.dataset(), task.frozen["vqvae"]
    assert len(data) == 2 * NUM_VIEWS
    with torch.no_grad():
        for row, image in ((2, task.data[2]["image"]), (NUM_VIEWS + 2, task.data[2]["image"].flip(-1))):
            assert torch.equal(data[row]["indices"], vqvae.encode(image[None]).indices.flatten())  # type: ignore[operator]
    assert torch.equal(task.labels[:NUM_VIEWS], task.labels[NUM_VIEWS:])


def test_classes_are_the_distinct_captions(folders: Path) -> None:
    task = build(folders)
    assert task.class_names == ["chest gold", "table medium long"]
    assert task.labels.tolist() == [0] * 4 + [1] * 4 + [0] * 4
    assert task.modules["transformer"].config.num_classes == 2  # type: ignore[union-attr]


def test_prompt_table_holds_what_the_encoder_says(folders: Path) -> None:
    task = build(folders, text=True)
    task.dataset()
    assert task.table is not None
    index, uniforms = torch.tensor([5, 5, 7]), torch.tensor([0.0, 0.99, 0.5])
    picked = task.table.pick(index, uniforms, torch.tensor([False, False, True]))
    expected = encode_text([task.prompts[5][0], task.prompts[5][2], ""], task.tokenizer, task.frozen["text_encoder"])
    torch.testing.assert_close(picked["text"], expected.tokens, rtol=2e-3, atol=2e-3)  # stored in half precision
    torch.testing.assert_close(picked["pooled"], expected.pooled, rtol=2e-3, atol=2e-3)
    assert torch.equal(picked["text_mask"], expected.mask)


def test_each_distinct_text_is_encoded_once(tmp_path: Path) -> None:
    seen: list[str] = []

    def encode(texts: list[str]) -> EncodedText:
        seen.extend(texts)
        return EncodedText(torch.zeros(len(texts), 2, 3), torch.ones(len(texts), 2, dtype=torch.bool), torch.zeros(len(texts), 4))

    table = build_prompt_table(tmp_path, [("a", "b"), ("a", "c"), ("b", "")], "encoder", encode, batch_size=2)
    assert seen == ["", "a", "b", "c"]
    assert table.rows.tolist() == [[1, 2], [1, 3], [2, 0]]


@pytest.mark.parametrize("text", [False, True])
def test_a_step_shared_by_two_processes_has_the_same_loss(folders: Path, text: bool) -> None:
    task = build(folders, text)
    task.modules["transformer"].train()
    for step in range(4):
        whole, _ = run_step(task, step=step)
        halves = [run_step(task, rows, step, num_processes=2, process_index=i)[0] for i, rows in enumerate((slice(0, 3), slice(3, 6)))]
        torch.testing.assert_close((halves[0].loss + halves[1].loss) / 2, whole.loss, rtol=1e-5, atol=1e-6)


def test_reuse_trains_the_reuse_path_and_leaves_the_average_alone(folders: Path) -> None:
    for probability, reached in ((0.0, False), (1.0, True)):
        task = build(folders, reuse_probability=probability)
        phase, average = run_step(task)
        phase.loss.backward()
        net = task.modules["transformer"]
        assert all((p.grad is not None) == reached for name, p in net.named_parameters() if name.startswith("reuse."))
        assert all(p.grad is None for p in average.parameters())
        assert phase.logs["reuse"] == probability


def test_state_comes_from_the_average_with_labels_not_dropped_twice(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = build(folders, reuse_probability=1.0, null_probability=0.0)
    seen: list[tuple[bool, Tensor]] = []
    forward = ENATTransformer2DModel.forward

    def record(self: ENATTransformer2DModel, ids: Tensor, condition: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        seen.append((self.training, condition["class_labels"]))
        return forward(self, ids, condition, *args, **kwargs)

    monkeypatch.setattr(ENATTransformer2DModel, "forward", record)
    net = task.modules["transformer"].train()
    net.register_to_config(class_dropout=0.999)  # type: ignore[operator]
    run_step(task)
    assert [training for training, _ in seen] == [False, True]
    assert torch.equal(seen[0][1], task.labels[:6])
    assert seen[1][1].tolist() == [2] * 6


@pytest.mark.parametrize("text", [False, True])
def test_null_condition_hides_the_picture_it_belongs_to(folders: Path, text: bool) -> None:
    task = build(folders, text, null_probability=1.0)
    task.dataset()
    ctx = StepContext(0, 0, CPU)
    first, second = (task.condition(torch.tensor([i]), ctx) for i in (0, 5))
    assert all(torch.equal(first[name], second[name]) for name in first)
    shown = build(folders, text, null_probability=0.0)
    shown.dataset()
    first, second = (shown.condition(torch.tensor([i]), ctx) for i in (0, 5))
    assert any(not torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("text", "precision"), [(False, "no"), (True, "bf16")])
def test_training_learns_samples_and_exports_a_pipeline(folders: Path, tmp_path: Path, text: bool, precision: Any) -> None:
    from genkit.pipelines.enat import ENATPipeline

    sampling = enat.SamplingConfig(num_inference_steps=2, prompts=("chest gold",))
    options: dict[str, Any] = {"export_dtype": "float16", "optimizer": "muon"} if text else {"export_dtype": "float32"}
    task = build(folders, text, sampling=sampling, lr=3e-3, **options)
    config = TrainConfig(str(tmp_path / "run"), steps=4, batch_size=4, mixed_precision=precision, sample_every=4, log_every=1)
    result = Trainer(task, config).run()
    assert result.step == 4
    assert list((tmp_path / "run" / "samples").iterdir())
    pipe = ENATPipeline.from_pretrained(tmp_path / "run" / "export")
    pipe.set_progress_bar_config(disable=True)
    output = pipe("chest gold", generator=[3], num_inference_steps=2)
    assert isinstance(output, ImageOutput)
    assert output.images[0].size == (8, 8)
    assert {"transformer", "scheduler", "vqvae"} <= {path.name for path in (tmp_path / "run" / "export").iterdir()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_encoder": "somewhere"}, "give both or none"),
        ({"flip": True, "text_encoder": "a", "tokenizer": "b"}, "may name a side"),
        ({"reuse_probability": 1.5}, r"\[0, 1\], got 1.5"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"mask_beta": (0.0, 3.0)}, "above 0"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        enat.Config(vqvae="vqvae", **options)


def test_pictures_to_judge_belong_to_their_index(folders: Path) -> None:
    task = build(folders, text=True, sampling=enat.SamplingConfig(num_inference_steps=2))
    ctx = StepContext(0, 5, CPU, {"transformer": task.modules["transformer"].eval()})
    pictures = task.generate([0, 1, 2], ctx)
    assert pictures.shape == (3, 3, 8, 8)
    assert_close(task.generate([2], ctx), pictures[2:], rtol=1e-4, atol=1e-4)


def test_chosen_views_are_the_only_ones_learned_from(folders: Path) -> None:
    task = build(folders, text=True)
    views = sorted({task.data.view_of(i) for i in range(len(task.data))})  # type: ignore[union-attr]
    chosen = build(folders, text=True, views=(views[1],)).dataset()
    rows = [int(chosen[i]["index"]) for i in range(len(chosen))]
    assert rows and {task.data.view_of(row) for row in rows} == {views[1]}  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="views must be numbers"):
        build(folders, text=True, views=(99,)).dataset()


def test_training_starts_from_given_weights(folders: Path, tmp_path: Path) -> None:
    first = build(folders, text=True)
    cast(ENATTransformer2DModel, first.modules["transformer"]).save_pretrained(tmp_path / "transformer")
    names: dict[str, Any] = {"text_encoder": str(folders / "text_encoder"), "tokenizer": str(folders / "tokenizer")}
    model = enat.ModelConfig(hidden_size=16, num_heads=2, num_encoder_layers=1, num_decoder_layers=1)
    settings: dict[str, Any] = {
        "vqvae": str(folders / "vqvae"),
        "data": str(folders / "train.parquet"),
        "image_size": 8,
        "cache": str(folders / "cache"),
    }
    second = enat.build(enat.Config(**settings, **names, model=model, prompts_per_picture=3, start=str(tmp_path / "transformer")))
    assert_close(second.modules["transformer"].state_dict(), first.modules["transformer"].state_dict(), rtol=0, atol=0)


def test_a_lora_leaves_the_generator_as_it_is_and_is_applied_by_name(folders: Path, tmp_path: Path) -> None:
    base = build(folders)
    base.export({"transformer": base.modules["transformer"]}, tmp_path / "base")
    options: dict[str, Any] = {"start": str(tmp_path / "base" / "transformer"), "lr": 0.05}
    with pytest.raises(ValueError, match="give its folder as start"):
        build(folders, lora=LoRAConfig())
    model = enat.ModelConfig(hidden_size=16, num_heads=2, num_encoder_layers=1, num_decoder_layers=1)
    settings: dict[str, Any] = {"image_size": 8, "cache": str(folders / "cache"), "model": model, "lora": LoRAConfig(rank=2), **options}
    task = enat.build(enat.Config(vqvae=str(folders / "vqvae"), data=str(folders / "train.parquet"), **settings))
    Trainer(task, TrainConfig(out=str(tmp_path / "run"), steps=6, batch_size=4, ema_decay=0.5)).run()
    change, whole = LoRAWeights.load(tmp_path / "run" / "export" / "lora"), GenPipeline.from_pretrained(tmp_path / "run" / "export")
    assert change.base_model == options["start"] and set(change.pairs) == {
        f"blocks.{i}.branches.0.f.{name}" for i in range(2) for name in ("q", "kv", "context_kv", "proj")
    }
    pipe: Any = GenPipeline.from_pretrained(tmp_path / "base")
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    pipe.load_lora(tmp_path / "run" / "export" / "lora")
    for name, value in cast(Any, whole).transformer.state_dict().items():
        assert_close(pipe.transformer.state_dict()[name], value)
        is_changed = not torch.equal(value, before[name])
        assert is_changed == (name.removesuffix(".weight") in change.pairs)
    with pytest.raises(FileNotFoundError, match="is no LoRA"):
        pipe.load_lora(tmp_path)


def test_fake_quantisation_trains_and_leaves_rounded_weights(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lora and fake_quant exclude each other"):
        build(folders, lora=LoRAConfig(), fake_quant=FakeQuantConfig(), start="somewhere")
    task = build(folders, fake_quant=FakeQuantConfig(bits=3), optimizer="muon")
    Trainer(task, TrainConfig(out=str(tmp_path), steps=2, batch_size=4, ema_decay=0.5)).run()
    pipe: Any = GenPipeline.from_pretrained(tmp_path / "export")
    inside, outside = pipe.transformer.blocks[0].branches[1].f.fc1.weight, pipe.transformer.reuse.f.fc1.weight
    assert max(len(row.unique()) for row in inside) <= 7 < len(outside[0].unique())
    assert pipe("chest gold", num_inference_steps=2, generator=1).images


def test_a_pruned_generator_is_trained_on(folders: Path, tmp_path: Path) -> None:
    net = cast(ENATTransformer2DModel, build(folders).modules["transformer"])
    small = pruned(net, {"blocks.0.branches.1.f": torch.arange(5)})
    small.save_pretrained(tmp_path / "small")
    model = enat.ModelConfig(hidden_size=16, num_heads=2, num_encoder_layers=1, num_decoder_layers=1, stack=small.config["stack"])
    settings: dict[str, Any] = {"image_size": 8, "cache": str(folders / "cache"), "model": model, "start": str(tmp_path / "small")}
    task = enat.build(enat.Config(vqvae=str(folders / "vqvae"), data=str(folders / "train.parquet"), **settings))
    Trainer(task, TrainConfig(out=str(tmp_path / "run"), steps=1, batch_size=4)).run()
    pipe: Any = GenPipeline.from_pretrained(tmp_path / "run" / "export")
    assert pipe.transformer.blocks[0].branches[1].f.fc1.weight.shape[0] == 5
