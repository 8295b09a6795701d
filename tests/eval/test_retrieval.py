"""Caption retrieval: nearest by cosine, own view left out, cached features."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from genkit.data.views import ViewDataset
from genkit.eval.features import FeatureNetwork
from genkit.eval.retrieval import caption_share, extract, nearest, view_features
from tests.data.toy import strips, write_views


def test_nearest_is_by_angle_not_by_length() -> None:
    references = torch.tensor([[1.0, 0.0], [0.0, 10.0], [-1.0, 0.0]])
    assert nearest(torch.tensor([[5.0, 1.0], [0.1, 0.2], [-9.0, 1.0]]), references).tolist() == [0, 1, 2]


def test_left_out_reference_is_never_found() -> None:
    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    own = torch.arange(20)
    assert nearest(x, x).tolist() == own.tolist()
    found = nearest(x, x, own)
    assert not (found == own).any()
    similarity = torch.nn.functional.normalize(x, dim=1) @ torch.nn.functional.normalize(x, dim=1).T
    similarity.fill_diagonal_(-2)
    assert torch.equal(found, similarity.argmax(1))
    some = own.clone()
    some[::2] = -1
    assert torch.equal(nearest(x, x, some)[::2], own[::2])


def test_chunks_do_not_change_the_result() -> None:
    generator = torch.Generator().manual_seed(1)
    queries, references = torch.randn(33, 4, generator=generator), torch.randn(21, 4, generator=generator)
    out = torch.randint(0, 21, (33,), generator=generator)
    for chunk in (1, 7, 33, 100):
        assert torch.equal(nearest(queries, references, out, chunk), nearest(queries, references, out))


def test_share_counts_equal_captions() -> None:
    references = torch.eye(3)
    queries = torch.tensor([[1.0, 0.1, 0.0], [0.0, 1.0, 0.1], [0.1, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert caption_share(queries, ["a", "b", "c", "b"], references, ["a", "b", "b"]) == 0.75


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="d=4"):
        nearest(torch.zeros(2, 4), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="got 1 references"):
        nearest(torch.zeros(1, 3), torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="got 1 for 2 queries"):
        caption_share(torch.zeros(2, 3), ["a"], torch.zeros(2, 3), ["a", "b"])


def test_view_features_are_those_of_the_views_and_are_kept(tmp_path: Path) -> None:
    data = ViewDataset(write_views(tmp_path / "train.parquet", list(strips(2, side=32))), 32, cache=tmp_path)
    network = FeatureNetwork(size=32)
    found = view_features(network, data, tmp_path, batch_size=3)
    expected = extract(network, [torch.stack([data[i]["image"] for i in range(len(data))])])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    file = next(tmp_path.glob("features-*.npy"))
    written = file.stat().st_mtime_ns
    assert torch.equal(view_features(network, data, tmp_path), found)
    assert file.stat().st_mtime_ns == written
