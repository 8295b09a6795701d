"""Laws of `Layout`: positions follow pos, then the grid, then the running index; the memo makes each thing once."""

from __future__ import annotations

import pytest
import torch

from genkit.blocks.layout import Layout

CPU = torch.device("cpu")


def test_memo_makes_each_thing_once_per_layout() -> None:
    made: list[str] = []
    layout = Layout()
    for key in ("a", "a", "b"):
        assert layout.memo(key, lambda key=key: made.append(key) or key) == key  # type: ignore[misc, func-returns-value]
    assert made == ["a", "b"]
    assert layout.memo("a", lambda: "other") == "a"
    assert Layout().memo("a", lambda: "other") == "other"


def test_grid_positions_are_row_then_column_after_the_prefix() -> None:
    pos = Layout(grid=(2, 3), prefix=1).positions(2, 7, CPU)
    assert pos[0].tolist() == [[0, 0], [0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert Layout(grid=(2, 1, 2)).positions(2, 4, CPU)[0].tolist() == [[0, 0], [0, 1], [0, 0], [0, 1]]


def test_given_pos_wins_and_a_running_index_starts_after_the_cache() -> None:
    pos = torch.tensor([[[5.0, 1.0], [6.0, 2.0]]])
    assert torch.equal(Layout(grid=(1, 2), pos=pos).positions(2, 2, CPU), pos)
    assert Layout(pos=pos).positions(1, 2, CPU, start=9)[0, :, 0].tolist() == [1, 2]
    assert Layout().positions(1, 2, CPU, start=9)[0, :, 0].tolist() == [9, 10]


def test_positions_that_cannot_be_known_are_refused() -> None:
    with pytest.raises(ValueError, match="2-axis positions need pos or a grid"):
        Layout().positions(2, 4, CPU)
    with pytest.raises(ValueError, match=r"grid \(2, 2\) with prefix 0 does not describe 5 tokens"):
        Layout(grid=(2, 2)).positions(2, 5, CPU)
    with pytest.raises(ValueError, match="give them as pos"):
        Layout(grid=(2, 2)).positions(2, 1, CPU, start=1)
    with pytest.raises(ValueError, match=r"pos must be \[b or 1, 3, 1 or more\]"):
        Layout(pos=torch.zeros(1, 2, 1)).positions(1, 3, CPU)
    for bad in ({"grid": (0, 2)}, {"grid": ()}, {"prefix": -1}, {"pos": torch.zeros(2, 2)}):
        with pytest.raises(ValueError, match="Layout"):
            Layout(**bad)
