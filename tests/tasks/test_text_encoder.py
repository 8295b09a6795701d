"""The text encoder's task: loss, tokenizer, batches over processes, export."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, CLIPTextModelWithProjection, PreTrainedTokenizerFast

from genkit.data.views import ViewDataset
from genkit.tasks import text_encoder
from genkit.tasks.text_encoder import Config, TextEncoderTask, contrastive_loss, train_tokenizer
from genkit.training.task import StepContext
from tests.data.toy import strips, write_views

PROMPTS = ["a golden chest", "treasure chest", "a long wooden table", "small table"] * 5


@pytest.fixture
def task(tmp_path: Path) -> TextEncoderTask:
    config = Config(width=16, layers=2, heads=2, mlp_dim=32, projection=8, positions=8, vocab_size=300)
    data = ViewDataset(write_views(tmp_path / "train.parquet", list(strips())), 8, cache=tmp_path)
    features = torch.randn(len(data), 12, generator=torch.Generator().manual_seed(0))
    return TextEncoderTask(config, data, features)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(PROMPTS, 320, 8)


def test_loss_is_cross_entropy_when_only_the_diagonal_is_positive() -> None:
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(5))
    torch.testing.assert_close(contrastive_loss(logits, torch.eye(5, dtype=torch.bool)), expected, rtol=1e-5, atol=1e-6)


def test_loss_counts_all_positives_together() -> None:
    assert float(contrastive_loss(torch.randn(4, 4), torch.ones(4, 4, dtype=torch.bool))) == pytest.approx(0, abs=1e-6)
    half = torch.tensor([[True, True, False, False]] * 2 + [[False, False, True, True]] * 2)
    assert float(contrastive_loss(torch.zeros(4, 4), half)) == pytest.approx(math.log(2), rel=1e-6)


def test_every_text_has_tokens_and_comes_back(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "zoë's Étagère 椅"
    ids = tokenizer(text, truncation=False)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text.lower()
    assert tokenizer("A TABLE")["input_ids"] == tokenizer("  a table ")["input_ids"]


def test_end_token_survives_truncation_and_is_no_reserved_id(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("chest " * 40, truncation=True)["input_ids"]
    assert (len(ids), ids[0], ids[-1]) == (8, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert tokenizer.eos_token_id != 2
    short = tokenizer("chest", padding="max_length")
    assert short["input_ids"][3:] == [tokenizer.pad_token_id] * 5
    assert short["attention_mask"] == [1, 1, 1, 0, 0, 0, 0, 0]


def test_tokenizer_depends_on_its_prompts_only(tokenizer: PreTrainedTokenizerFast) -> None:
    again = train_tokenizer(PROMPTS, 320, 8)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again("a long treasure")["input_ids"] == tokenizer("a long treasure")["input_ids"]


def test_pooled_vector_ignores_padding(task: TextEncoderTask) -> None:
    text = task.modules["pair"].text
    ids = task.tokenizer(["a chest"])["input_ids"]
    padded = [ids[0] + [task.tokenizer.pad_token_id] * (8 - len(ids[0]))]
    with torch.no_grad():
        alone, beside = (text(input_ids=torch.tensor(x)).text_embeds for x in (ids, padded))  # type: ignore[operator]
    torch.testing.assert_close(alone, beside, rtol=1e-5, atol=1e-6)


def test_views_of_equal_captions_are_each_others_positives(task: TextEncoderTask) -> None:
    assert task.labels.tolist() == [0] * 4 + [1] * 4 + [0] * 4


def test_step_trains_every_parameter(task: TextEncoderTask) -> None:
    phases = list(task.step({"index": torch.arange(12)}, StepContext(0, 0, torch.device("cpu"))))
    phases[0].loss.backward()
    missing = [n for n, p in task.modules["pair"].named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert missing == []
    owned = {id(p) for group in task.optimizers()["main"].param_groups for p in group["params"]}
    assert owned == {id(p) for p in task.modules["pair"].parameters()}


def test_loss_falls_on_a_fixed_batch(task: TextEncoderTask) -> None:
    optimizer = task.optimizers()["main"]
    losses = []
    for _ in range(30):
        loss = next(iter(task.step({"index": torch.arange(12)}, StepContext(0, 0, torch.device("cpu"))))).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_prompts_follow_the_step_and_the_seed(task: TextEncoderTask) -> None:
    def loss(step: int, seed: int) -> float:
        return float(next(iter(task.step({"index": torch.arange(12)}, StepContext(step, seed, torch.device("cpu"))))).loss.detach())

    assert loss(1, 0) == loss(1, 0)
    assert len({loss(1, 0), loss(2, 0), loss(1, 1)}) == 3


def test_gradients_of_two_processes_average_to_those_of_one(task: TextEncoderTask, monkeypatch: pytest.MonkeyPatch) -> None:
    module = task.modules["pair"]

    def run(index: torch.Tensor, context: StepContext) -> tuple[float, list[torch.Tensor]]:
        module.zero_grad()
        loss = next(iter(task.step({"index": index}, context))).loss
        loss.backward()
        return float(loss.detach()), [p.grad.clone() for p in module.parameters() if p.grad is not None]

    device, halves = torch.device("cpu"), torch.tensor([0, 5, 9, 2, 7, 4]).split(3)
    whole_loss, whole = run(torch.cat(halves), StepContext(3, 0, device))
    contexts = [StepContext(3, 0, device, num_processes=2, process_index=rank) for rank in (0, 1)]
    seen: list[list[torch.Tensor]] = [[], []]
    for rank in (0, 1):
        with monkeypatch.context() as patch:
            patch.setattr(text_encoder, "gather_rows", lambda rows, kept=seen[rank]: kept.append(rows.detach()) or rows)
            run(halves[rank], contexts[rank])
    parts = []
    for rank in (0, 1):
        others = iter(seen[1 - rank])
        with monkeypatch.context() as patch:
            pair = (lambda rows, other: [rows, other]) if rank == 0 else (lambda rows, other: [other, rows])
            patch.setattr(text_encoder, "gather_rows", lambda rows, pair=pair, others=others: torch.cat(pair(rows, next(others))))
            parts.append(run(halves[rank], contexts[rank]))
    assert [loss for loss, _ in parts] == pytest.approx([whole_loss] * 2, rel=1e-5)
    for first, second, expected in zip(parts[0][1], parts[1][1], whole, strict=True):
        torch.testing.assert_close((first + second) / 2, expected, rtol=1e-4, atol=1e-6)


def test_accumulation_is_refused(task: TextEncoderTask) -> None:
    with pytest.raises(ValueError, match=r"train\.accumulation must be 1"):
        next(iter(task.step({"index": torch.arange(4)}, StepContext(0, 0, torch.device("cpu"), num_parts=2))))


def test_export_is_read_by_transformers(task: TextEncoderTask, tmp_path: Path) -> None:
    task.export(task.modules, tmp_path / "out")
    model = CLIPTextModelWithProjection.from_pretrained(tmp_path / "out" / "text_encoder")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    assert model.dtype == torch.float16
    assert task.modules["pair"].text.dtype == torch.float32
    ids = tokenizer(["a golden chest"], padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    assert torch.equal(ids, task.tokenizer(["a golden chest"], padding="max_length", return_tensors="pt")["input_ids"])
    with torch.no_grad():
        expected = task.modules["pair"].text(input_ids=ids).text_embeds  # type: ignore[operator]
        torch.testing.assert_close(model.float()(input_ids=ids).text_embeds, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("change", "match"), [({"heads": 3}, "heads=3"), ({"vocab_size": 100}, "260"), ({"positions": 2}, "3"), ({"lr": 0.0}, "lr")]
)
def test_impossible_settings_are_refused(change: dict[str, float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Config(**change)  # type: ignore[arg-type]
