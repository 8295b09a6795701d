"""Laws of the ENAT transformer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from genkit.blocks.attention import Attention
from genkit.generators import enat_context
from genkit.generators.enat import SIZES, ENATCondition, ENATState, ENATTransformer2DModel
from genkit.generators.enat_index import positions_where, take

B, CODES, TEXT, POOLED, M = 3, 11, 5, 7, 4
SMALL = {"sample_size": [3, 5], "hidden_size": 16, "num_heads": 2, "num_encoder_layers": 2, "num_decoder_layers": 2, "codebook_size": CODES}
N = 15
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def build(**options: Any) -> ENATTransformer2DModel:
    """A class model with random weights everywhere, so that no block is the identity."""
    torch.manual_seed(0)
    model = ENATTransformer2DModel(**(SMALL | {"num_classes": 4} | options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    return model.eval()


def build_text(**options: Any) -> ENATTransformer2DModel:
    return build(num_classes=None, text_dim=TEXT, pooled_dim=POOLED, **options)


def text_inputs(b: int = B) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    mask = torch.arange(M) < torch.tensor([M, 2, 3])[:b, None]
    return {"text": torch.randn(b, M, TEXT, generator=generator), "text_mask": mask, "pooled": torch.randn(b, POOLED, generator=generator)}


def grids(*counts: int, b: int = B) -> list[Tensor]:
    """Nested grids with the given numbers of masked tokens, falling."""
    generator = torch.Generator().manual_seed(1)
    full = torch.randint(CODES, (b, N), generator=generator)
    ranks = torch.rand(b, N, generator=generator).argsort(1).argsort(1)
    return [full.masked_fill(ranks < count, CODES) for count in counts]


LABELS = torch.tensor([0, 2, 4])


def test_published_sizes_have_the_published_parameter_counts() -> None:
    dead = {"enat_l_256": 8_393_728, "enat_l_512": 8_393_728, "enat_b_256": 4_722_432}  # an unused MLP of the official files
    published = {"enat_l_256": 574_298_113, "enat_l_512": 575_084_545, "enat_b_256": 219_646_721}
    for name, count in published.items():
        with torch.device("meta"):
            model = ENATTransformer2DModel(**SIZES[name])
        assert sum(p.numel() for p in model.parameters()) == count - dead[name]


def test_new_model_is_the_identity_in_every_block() -> None:
    model = ENATTransformer2DModel(**SMALL, num_classes=4).eval()
    (ids,) = grids(6)
    feat = model(ids, {"class_labels": LABELS}).state.feat
    torch.testing.assert_close(feat, model.embedding(ids), rtol=0, atol=0)


@torch.no_grad()
def test_state_of_an_all_masked_grid_changes_nothing() -> None:
    model, (full, ids) = build(), grids(N, 6)
    condition = model.prepare_condition(LABELS)
    with_state = model(ids, condition, model(full, condition).state)
    without = model(ids, condition)
    assert torch.equal(with_state.logits, without.logits)
    assert torch.equal(with_state.state.feat, without.state.feat)


@torch.no_grad()
def test_reuse_differs_from_encoding_anew() -> None:
    model, (first, second) = build(), grids(9, 6)
    condition = model.prepare_condition(LABELS)
    reused, anew = model(second, condition, model(first, condition).state), model(second, condition)
    assert not torch.allclose(reused.logits, anew.logits, atol=1e-2)


@torch.no_grad()
def test_visible_features_depend_on_visible_tokens_only() -> None:
    model, (many, few) = build(), grids(9, 6)
    visible = many[0] != CODES
    with_more_masked = model(many[:1], {"class_labels": LABELS[:1]}).state.feat[0, visible]
    fewer_masked = few[:1].masked_fill(~visible & (few[:1] != CODES), CODES)
    assert torch.equal(fewer_masked, many[:1])
    undecoded = model(many[:1], {"class_labels": LABELS[:1]}, logits_at="none")
    torch.testing.assert_close(with_more_masked, undecoded.state.feat[0, visible], rtol=0, atol=0)  # decoder blocks leave them alone
    assert undecoded.logits is None


@torch.no_grad()
def test_without_new_tokens_visible_features_are_the_projected_old_ones() -> None:
    model, (ids,) = build(), grids(6)
    condition = model.prepare_condition(LABELS)
    state = model(ids, condition).state
    again = model(ids, condition, state).state
    visible = ids != CODES
    torch.testing.assert_close(again.feat[visible], model.reuse(state.feat)[visible], **CLOSE)


@torch.no_grad()
def test_joint_permutation_of_tokens_and_positions_permutes_the_result() -> None:
    model, (first, second) = build(), grids(9, 6)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(2))
    condition = model.prepare_condition(LABELS)
    logits = model(second, condition, model(first, condition).state).logits
    model.embedding.position.copy_(model.embedding.position[order])
    permuted = model(second[:, order], condition, model(first[:, order], condition).state).logits
    torch.testing.assert_close(permuted, logits[:, order], **CLOSE)


@torch.no_grad()
def test_given_indices_equal_found_ones_and_masked_logits_equal_all() -> None:
    model, (first, second) = build(), grids(9, 6)
    condition = model.prepare_condition(LABELS)
    state = model(first, condition).state
    masked, new = positions_where(second == CODES, 6), positions_where((first == CODES) & (second != CODES), 3)
    found = model(second, condition, state)
    given = model(second, condition, state, masked_index=masked, new_index=new, logits_at="masked")
    torch.testing.assert_close(given.logits, take(found.logits, masked), **CLOSE)
    assert torch.equal(given.state.feat, found.state.feat)
    assert torch.equal(given.state.is_masked, second == CODES)


@pytest.mark.parametrize("make", [build, build_text])
def test_projections_of_all_blocks_at_once_equal_block_by_block(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    inputs: dict[str, Any] = {"class_labels": LABELS} if make is build else text_inputs()
    first, second = grids(9, 6)

    def run(stack_context: bool) -> Tensor:
        condition = model.prepare_condition(**inputs, stack_context=stack_context)
        assert (condition.context_weights is not None) == stack_context
        return model(second, condition, model(first, condition).state).logits

    together = run(True)
    torch.testing.assert_close(run(False), together, **CLOSE)
    monkeypatch.setattr(enat_context, "MAX_BATCHED_TOKENS", 0)
    assert torch.equal(run(True), run(False))  # too many tokens for one product


def test_wrapped_projections_are_called_not_read() -> None:
    class Wrapped(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    model = build()
    attention = model.get_submodule("blocks.0.branches.0.f")
    assert isinstance(attention, Attention)
    assert attention.context_kv is not None
    wrapped = Wrapped(16, 32)
    wrapped.load_state_dict(attention.context_kv.state_dict())
    attention.context_kv = wrapped
    assert model.prepare_condition(LABELS, stack_context=True).context_weights is None


@pytest.mark.parametrize("make", [build, build_text])
@torch.no_grad()
def test_samples_and_conditions_do_not_see_each_other(make: Any) -> None:
    model = make()
    inputs: dict[str, Any] = {"class_labels": LABELS} if make is build else text_inputs()
    first, second = grids(9, 6)
    condition = model.prepare_condition(**inputs)
    state = model(first, condition).state
    together = model(second, condition, state)
    alone = [ENATCondition.cat([model.prepare_condition(**{k: v[i : i + 1] for k, v in inputs.items()})]) for i in range(B)]
    torch.testing.assert_close(ENATCondition.cat(alone).modulation, condition.modulation, **CLOSE)
    row = torch.tensor([1])
    one = model(second[1:2], condition.rows(row), state.rows(row))
    torch.testing.assert_close(one.logits, together.logits[1:2], **CLOSE)
    joined = ENATState.cat([state.rows(row), state.rows(torch.tensor([0, 2]))])
    assert torch.equal(joined.feat[0], state.feat[1])
    assert torch.equal(joined.is_masked[1], state.is_masked[0])


@torch.no_grad()
def test_padded_text_tokens_change_nothing() -> None:
    model, inputs = build_text(), text_inputs()
    first, second = grids(9, 6)

    def run(inputs: dict[str, Any]) -> Tensor:
        condition = model.prepare_condition(**inputs)
        state = model(torch.full_like(first, CODES), condition, logits_at="none").state
        return model(second, condition, model(first, condition, state).state).logits

    short = {"text": inputs["text"][1:2, :2], "pooled": inputs["pooled"][1:2]}
    longer = {k: v[1:2] for k, v in inputs.items()}
    longer["text"] = longer["text"].masked_fill(~longer["text_mask"][..., None], 1e3)
    full = run(inputs)[1:2]
    first, second = first[1:2], second[1:2]
    torch.testing.assert_close(run(longer), full, **CLOSE)
    torch.testing.assert_close(run(short), full, **CLOSE)


@torch.no_grad()
def test_text_reaches_the_first_step_and_stays_in_the_state() -> None:
    model, inputs = build_text(), text_inputs()
    ids = torch.full((B, N), CODES)
    out = model(ids, inputs)
    assert out.state.feat.shape == (B, M + N, 16)
    other = inputs | {"text": inputs["text"] + 1}
    assert not torch.allclose(model(ids, other).logits, out.logits, atol=1e-3)
    _, second = grids(9, 6)
    condition = model.prepare_condition(**inputs)
    following = model(second, condition, out.state).state.feat
    torch.testing.assert_close(following[:, :M], model.reuse(out.state.feat[:, :M]), **CLOSE)  # text is not encoded again


@torch.no_grad()
def test_conditions_with_and_without_mask_can_be_joined_but_not_two_lengths() -> None:
    model, inputs = build_text(), text_inputs()
    masked = model.prepare_condition(**inputs)
    unmasked = model.prepare_condition(text=inputs["text"], pooled=inputs["pooled"])
    joined = ENATCondition.cat([masked, unmasked])
    assert joined.token_mask is not None
    assert bool(joined.token_mask[B:].all())
    shorter = model.prepare_condition(text=inputs["text"][:, :2], pooled=inputs["pooled"])
    with pytest.raises(ValueError, match="pad the prompts"):
        ENATCondition.cat([unmasked, shorter])


def test_shared_modulation_has_one_linear_and_an_offset_per_block() -> None:
    model, own = build(shared_modulation=True), build()
    saved = sum(p.numel() for p in own.parameters()) - sum(p.numel() for p in model.parameters())
    assert saved == 3 * (8 * 16 * 16 + 8 * 16) - 4 * 8 * 16
    vectors = model.prepare_condition(LABELS).modulation
    assert vectors.shape == (B, 4, 8, 16)
    torch.testing.assert_close(
        vectors[:, 1] - vectors[:, 0], (model.modulation_offset[1] - model.modulation_offset[0]).expand(B, -1, -1), **CLOSE
    )


def loss_of(model: ENATTransformer2DModel, reuse: bool, inputs: dict[str, Tensor]) -> Tensor:
    first, second = grids(9, 6)
    state = None
    if reuse:
        with torch.no_grad():
            state = model(first, inputs).state
    out = model(second, inputs, state, logits_at="masked")
    return out.logits.square().mean()


@pytest.mark.parametrize("options", [{}, {"shared_modulation": True}])
def test_reuse_step_reaches_every_parameter_and_plain_step_all_but_the_reuse_path(options: dict[str, Any]) -> None:
    model = build(**options).train()
    loss_of(model, True, {"class_labels": LABELS}).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    model.zero_grad(set_to_none=True)
    loss_of(model, False, {"class_labels": LABELS}).backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None}
    context = {f"blocks.{i}.branches.0.f.context_kv.{p}" for i in range(2) for p in ("weight", "bias")}
    assert idle == context | {name for name, _ in model.named_parameters() if name.startswith("reuse.")}


def test_text_steps_reach_every_parameter_between_them() -> None:
    model = build_text(shared_modulation=True).train()
    loss_of(model, True, text_inputs()).backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None]
    assert idle == ["text_proj.weight", "text_proj.bias"]  # the state holds the encoded text, without gradient
    loss_of(model, False, text_inputs()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_word_table_learns_from_the_input_side_only() -> None:
    model, (ids,) = build(), grids(6)
    ids = ids.masked_fill(ids < 3, 3)
    model(ids, {"class_labels": LABELS}).logits.square().sum().backward()
    unused = sorted(set(range(CODES)) - set(ids.flatten().tolist()))
    assert unused
    assert model.embedding.word.weight.grad is not None
    assert bool((model.embedding.word.weight.grad[unused] == 0).all())
    assert bool((model.embedding.word.weight.grad[CODES] != 0).any())


def test_embedding_dropout_follows_the_given_mask_in_training_and_is_off_otherwise() -> None:
    model, (ids,) = build(dropout=0.25), grids(6)
    keep = torch.rand(B, N, 16) > 0.25
    dropped = model.train().embedding(ids, keep)
    torch.testing.assert_close(dropped, model.eval().embedding(ids) * keep / 0.75, **CLOSE)
    assert not torch.equal(model.train().embedding(ids), model.eval().embedding(ids))


def test_drop_labels_uses_the_null_class_below_the_probability() -> None:
    model = build(class_dropout=0.5)
    assert model.null_class == 4
    assert model.drop_labels(torch.tensor([0, 1, 2]), torch.tensor([0.4, 0.5, 0.9])).tolist() == [4, 1, 2]


@pytest.mark.parametrize("make", [build, build_text])
def test_save_and_load_give_the_same_numbers(make: Any, tmp_path: Path) -> None:
    model, (ids,) = make(shared_modulation=True), grids(6)
    inputs: dict[str, Any] = {"class_labels": LABELS} if make is build else text_inputs()
    model.save_pretrained(tmp_path)
    loaded = ENATTransformer2DModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(ids, inputs).logits, model(ids, inputs).logits)
    assert loaded.grid == (3, 5)
    rebuilt = ENATTransformer2DModel.from_config(model.config)
    assert {k: v.shape for k, v in rebuilt.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


@torch.no_grad()
def test_bf16_stays_close_to_fp32() -> None:
    model, (first, second) = build(), grids(9, 6)
    state = model(first, {"class_labels": LABELS}).state
    expected = model(second, {"class_labels": LABELS}, state).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = model(second, {"class_labels": LABELS}, state).logits
    half = model.to(torch.bfloat16)
    state = half(first, {"class_labels": LABELS}).state
    logits = half(second, {"class_labels": LABELS}, state).logits
    assert logits.dtype == torch.bfloat16
    for got in (logits.float(), autocast.float()):
        assert (got - expected).norm() / expected.norm() < 0.05


@torch.no_grad()
def test_compiled_without_graph_breaks_gives_the_same_numbers() -> None:
    model, (first, second) = build(), grids(9, 6)
    condition = model.prepare_condition(LABELS)
    state = model(first, condition).state
    indices = {"masked_index": positions_where(second == CODES, 6), "new_index": positions_where((first == CODES) & (second != CODES), 3)}
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    out = compiled(second, condition, state, **indices, logits_at="masked")
    expected = model(second, condition, state, **indices, logits_at="masked")
    torch.testing.assert_close(out.logits, expected.logits, **CLOSE)


def test_checkpointed_gradients_equal_stored_ones() -> None:
    gradients = []
    for checkpointed in (False, True):
        model = build(dropout=0.0).train()
        if checkpointed:
            model.enable_gradient_checkpointing()
        loss_of(model, True, {"class_labels": LABELS}).backward()
        gradients.append([p.grad for p in model.parameters()])
    for stored, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, stored, rtol=0, atol=0)


@torch.no_grad()
def test_inputs_are_left_as_they_were() -> None:
    model, (first, second) = build(), grids(9, 6)
    condition = model.prepare_condition(LABELS)
    state = model(first, condition).state
    copies = [t.clone() for t in (second, state.feat, state.is_masked, condition.modulation)]
    model(second, condition, state)
    for copy, tensor in zip(copies, (second, state.feat, state.is_masked, condition.modulation), strict=True):
        assert torch.equal(copy, tensor)


def test_grids_that_do_not_fit_are_refused() -> None:
    model, (first, second) = build(), grids(9, 6)
    condition = {"class_labels": LABELS}
    state = model(second, condition).state
    with pytest.raises(ValueError, match="visible when the state was made"):
        model(first, condition, state)
    uneven = second.clone()
    uneven[0] = 1
    with pytest.raises(ValueError, match=r"same number of masked tokens, got \[0, 6, 6\]"):
        model(uneven, condition)
    with pytest.raises(ValueError, match=r"ids must be \[b, n\], n=15, got \[3, 14\]"):
        model(second[:, 1:], condition)
    with pytest.raises(ValueError, match="all 9 visible tokens are new"):
        model(second, condition, new_index=torch.zeros(B, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="Did you mean 'masked'"):
        model(second, condition, logits_at="maskd")


def test_conditions_of_the_other_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="takes class_labels and nothing else"):
        build().prepare_condition(text=torch.zeros(1, M, TEXT), pooled=torch.zeros(1, POOLED))
    with pytest.raises(ValueError, match="takes text and pooled"):
        build_text().prepare_condition(LABELS)
    with pytest.raises(ValueError, match="empty prompt"):
        _ = build_text().null_class


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "divisible by num_heads, got 16 and 3"),
        ({"num_classes": None}, "num_classes for a class model"),
        ({"text_dim": 4, "pooled_dim": 4}, "num_classes=None with text_dim"),
        ({"num_classes": None, "text_dim": 4}, "pooled_dim=None"),
        ({"num_decoder_layers": 0}, "num_decoder_layers=0"),
        ({"sample_size": [4, 0]}, r"sample_size=\[4, 0\]"),
        ({"dropout": 1.0}, r"\[0, 1\)"),
    ],
)
def test_impossible_configs_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ENATTransformer2DModel(**(SMALL | {"num_classes": 4} | options))
