"""Laws of the argument checks: good input passes untouched, bad input is named with what was expected."""

from __future__ import annotations

import pytest
import torch

from genkit.checks import check_shape, choose, nearest, unknown


def test_check_shape_returns_the_sizes_by_letter() -> None:
    assert check_shape(torch.zeros(2, 5, 3), "x", "b n 3", b=2) == {"b": 2, "n": 5, "3": 3}


@pytest.mark.parametrize(
    ("pattern", "sizes"),
    [("b n", {}), ("b n d e", {}), ("b n d", {"d": 4}), ("b n 4", {}), ("b n n", {})],
    ids=["too many axes", "too few axes", "known size differs", "fixed size differs", "equal letters differ"],
)
def test_check_shape_names_tensor_pattern_known_sizes_and_what_came(pattern: str, sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"^f: x must be \[b, n.*got \[2, 5, 3\]") as caught:
        check_shape(torch.zeros(2, 5, 3), "f: x", pattern, **sizes)
    assert all(f"{axis}={size}" in str(caught.value) for axis, size in sizes.items())


def test_check_shape_is_skipped_under_compile() -> None:
    compiled = torch.compile(lambda x: x + len(check_shape(x, "x", "b 7")), fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.zeros(2, 3)), torch.full((2, 3), 2.0))


def test_choose_returns_a_known_name_and_names_the_nearest_otherwise() -> None:
    assert choose("vq", ["vq", "simvq"], "quantizer") == "vq"
    with pytest.raises(ValueError, match=r"unknown quantizer 'SimVQQ'. Did you mean 'simvq'\? Known: lfq, simvq."):
        choose("SimVQQ", ["simvq", "lfq"], "quantizer")


def test_unknown_lists_at_most_thirty_and_guesses_only_when_close() -> None:
    text = unknown("zzz", [f"name{i:02d}" for i in range(40)], "model")
    assert "Did you mean" not in text
    assert "name29, ... (40 in all)" in text
    assert "name30" not in text
    assert unknown("a", [], "model").endswith("Known: none.")


def test_nearest_ignores_case() -> None:
    assert nearest("ADAMW", ["AdamW", "SGD"]) == "AdamW"
    assert nearest("qqq", ["AdamW", "SGD"]) is None
