"""The autoregressive generator and its pipeline: caches, order, sampling, streaming, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from genkit.blocks.attention import AttentionConfig
from genkit.blocks.wrappers import TokenShiftConfig
from genkit.convert import vim
from genkit.generators.vim import SIZES, VIMTransformer2DModel
from genkit.pipelines.base import GenPipeline
from genkit.pipelines.token_draws import DrawRule
from genkit.pipelines.vim import CodeWriter, VIMPipeline
from tests.pipelines.toy import toy_tokenizer

SMALL: dict[str, Any] = {"sample_size": [2, 3], "codebook_size": 32, "hidden_size": 16, "num_heads": 2, "depth": 2, "num_classes": 3}


def build(**options: Any) -> VIMTransformer2DModel:
    torch.manual_seed(0)
    model = VIMTransformer2DModel(**(SMALL | options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    return model.eval().requires_grad_(False)


def pipeline(**options: Any) -> Any:
    model = build(sample_size=4, class_dropout=0.1, **options)
    pipe = VIMPipeline(model, toy_tokenizer(), id2label={0: "chest", 1: "table", 2: "tree"})
    pipe.set_progress_bar_config(disable=True)
    return pipe


CODES = torch.randint(32, (2, 6), generator=torch.Generator().manual_seed(1))


def test_published_sizes_have_the_published_parameter_counts() -> None:
    with torch.device("meta"):
        model = VIMTransformer2DModel(**SIZES["vim_base"])
    d, layers, codes, tokens = 1536, 24, 8192, 1024
    assert sum(p.numel() for p in model.parameters()) == layers * (12 * d * d + 14 * d) + d * (2 * codes + 1000 + 1 + tokens + 2)


@pytest.mark.parametrize("conds", [torch.tensor([[0], [2]]), torch.tensor([[0, 1, 1], [2, 0, 1]])], ids=["one", "three"])
def test_chunks_through_the_cache_are_the_whole(conds: torch.Tensor) -> None:
    model = build(num_cond_tokens=conds.shape[1])
    whole = model(CODES, conds).logits
    cache, parts = model.new_cache(2), []
    for first, last in ((0, 2), (2, 3), (3, 6)):
        parts.append(model(CODES[:, first:last], conds if first == 0 else None, cache=cache).logits)
    assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
    released = build(num_cond_tokens=conds.shape[1], forgetful_cache=True)
    cache = released.new_cache(2)
    released(CODES[:, :2], conds, cache=cache)
    assert float((released(CODES[:, 2:3], cache=cache).logits - whole[:, 3:4]).abs().max()) > 1e-2  # its defect


def test_a_later_code_changes_no_earlier_logit_and_conditions_see_each_other() -> None:
    model, conds = build(num_cond_tokens=2), torch.tensor([[0, 1], [2, 0]])
    changed = CODES.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 32
    a, b = model(CODES, conds).logits, model(changed, conds).logits
    assert torch.equal(a[:, :4], b[:, :4]) and not torch.equal(a[:, 4:], b[:, 4:])
    hidden: list[torch.Tensor] = []
    hook = model.blocks[0].register_forward_hook(lambda m, i, o: hidden.append(o))
    model(CODES, conds)
    model(CODES, torch.tensor([[0, 2], [2, 1]]))
    hook.remove()
    assert not torch.equal(hidden[0][:, 0], hidden[1][:, 0])  # the first condition token sees the second


def test_shifted_mixers_are_causal_and_refuse_others() -> None:
    with pytest.raises(ValueError, match="must be causal"):
        TokenShiftConfig(AttentionConfig())
    mixer = TokenShiftConfig(AttentionConfig(causal=True)).build(8, heads=2)
    cache = mixer.new_cache(2, 4, device="cpu", dtype=torch.float32)
    x = torch.randn(2, 4, 8)
    with torch.no_grad():
        whole = mixer(x)
        assert_close(torch.cat([mixer(x[:, :1], cache=cache), mixer(x[:, 1:], cache=cache)], 1), whole, rtol=1e-5, atol=1e-6)
        cache.reset()
        cache.reorder(torch.tensor([1]))
        assert_close(mixer(x[1:], cache=cache), whole[1:], rtol=1e-5, atol=1e-6)
    with pytest.raises(TypeError, match="ShiftCache"):
        mixer(x, cache=cache.inner)


def test_a_picture_depends_on_its_seed_alone() -> None:
    pipe = pipeline()
    both = pipe(["chest", 2], generator=[1, 2], output_type="pt")
    alone = pipe("tree", generator=[2], output_type="pt")
    assert torch.equal(both.tokens[1], alone.tokens[0]) and torch.equal(both.images[1], alone.images[0])
    together = pipe(["chest", 2], generator=[1, 2], output_type="pt", samples_at_once=2)
    assert torch.equal(together.tokens, both.tokens)
    assert both.images.shape == (2, 3, 8, 8)


def test_guidance_and_rules_change_what_is_drawn() -> None:
    pipe = pipeline()
    plain = pipe("chest", generator=[1]).tokens
    assert not torch.equal(pipe("chest", generator=[1], guidance_scale=8.0).tokens, plain)
    greedy = [pipe("chest", generator=[seed], top_k=1).tokens for seed in (1, 2)]
    assert torch.equal(*greedy)
    writer = CodeWriter(pipe.transformer, torch.tensor([[0]]), 3.0)
    assert len(writer.conds) == 2 and writer.logits(torch.zeros(1, 0, dtype=torch.long)).shape == (1, 32)
    assert DrawRule(top_p=1e-6).filtered(torch.tensor([[0.0, 2.0, 1.0]])).isinf().tolist() == [[True, False, True]]


def test_a_loop_streams_goes_on_and_follows_changes() -> None:
    pipe = pipeline()
    states = list(pipe.iterate("chest", generator=[3]))
    assert [state.sample.shape[1] for state in states] == list(range(1, 17))
    again = list(pipe.iterate(state=states[5]))
    assert torch.equal(again[-1].sample, states[-1].sample)
    preview = pipe.preview(states[3], "pt")
    assert preview.shape == (1, 3, 8, 8) and float(preview[:, :, 2:].abs().max()) == 0 and float(preview[:, :, :2].abs().max()) > 0
    changed = states[5].clone()
    changed.sample[:, -1] = (changed.sample[:, -1] + 7) % 32
    assert not torch.equal(list(pipe.iterate(state=changed))[-1].sample, states[-1].sample)
    loop = pipe.iterate("chest", generator=[3])
    next(loop).sample[0, 0] = 99
    with pytest.raises(ValueError, match=r"must stay \[1, 1\] codes in 0 \.\. 31"):
        next(loop)
    with pytest.raises(ValueError, match="nothing is left to do"):
        pipe.iterate(state=states[-1])


def test_unconditional_models_need_no_prompt(tmp_path: Path) -> None:
    pipe: Any = VIMPipeline(build(sample_size=4, num_classes=1), toy_tokenizer())
    pipe.set_progress_bar_config(disable=True)
    made = pipe(generator=[4]).tokens
    pipe.save_pretrained(tmp_path)
    again: Any = GenPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again(generator=[4]).tokens, made) and again.estimate_memory(2).peak > 0
    with pytest.raises(ValueError, match="without a null class"):
        pipe(guidance_scale=2.0)
    with pytest.raises(ValueError, match="knows 3 classes"):
        pipeline()()


def test_checkpoints_go_there_and_back() -> None:
    model = build(sample_size=2)
    state = vim.to_official(model)
    wrapped = {f"transformer.{key}": value for key, value in state.items()} | {"stage1_model.pre_quant.weight": torch.zeros(1)}
    assert vim.recognise({key: tuple(value.shape) for key, value in wrapped.items()})
    found, report = vim.from_official(wrapped, num_heads=2)
    assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), model.state_dict().values(), strict=True))
    assert list(report.dropped) == ["stage1_model.pre_quant.weight"]
    with pytest.raises(ValueError, match="not a stage-2 checkpoint"):
        vim.from_official({"a": torch.zeros(1)})


def test_probes_see_the_mean_of_a_block() -> None:
    model, conds, kept = build(), torch.tensor([[0], [2]]), []
    hook = model.blocks[1].register_forward_hook(lambda m, i, o: kept.append(o))
    model(CODES, conds)
    hook.remove()
    assert_close(model.features(CODES, conds, 1), kept[0][:, 1:].mean(1))
    with pytest.raises(ValueError, match=r"0 \.\. 1, got 2"):
        model.features(CODES, conds, 2)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="divisible by num_heads"):
        build(num_heads=3)
    with pytest.raises(ValueError, match="begins with conds"):
        build()(CODES)
    with pytest.raises(ValueError, match="begins with conds"):
        build()(torch.zeros(2, 7, dtype=torch.long), torch.tensor([[0], [1]]))
    with pytest.raises(ValueError, match="same number of codes"):
        VIMPipeline(build(codebook_size=8), toy_tokenizer())
    with pytest.raises(ValueError, match="top_p"):
        pipeline()("chest", top_p=0.0)
