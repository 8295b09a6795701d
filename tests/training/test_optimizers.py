"""Muon and AdamW behind one interface: the steps of both, one schedule, exact resume."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from genkit.training import checkpoint
from genkit.training.optimizers import FlatMuon, block_matrices, kernels, muon_with_adamw

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.blocks = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3))

    def forward(self, ids: Tensor) -> Tensor:
        return self.blocks(self.table(ids))


def build() -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = Net()
    return net, muon_with_adamw(*block_matrices(net), lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)


def descend(net: Net, optimizer: torch.optim.Optimizer, first: int, last: int) -> float:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(5, (8,), generator=generator)
        loss = (net(ids) - ids[:, None].float()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_matrices_of_blocks_are_muons_and_the_rest_is_adamws() -> None:
    net, optimizer = build()
    matrices, others = block_matrices(net)
    assert [tuple(p.shape) for p in matrices] == [(6, 4), (3, 6)] and len(others) == 3
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 3]


def test_one_step_is_that_of_both_optimizers() -> None:
    net, optimizer = build()
    other = copy.deepcopy(net)
    matrices, others = block_matrices(other)
    muon = torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    before = copy.deepcopy(net.state_dict())
    for p in (net, other):
        p(torch.arange(5)).square().sum().backward()
    for o in (optimizer, muon, adamw):
        o.step()
    for key, value in net.state_dict().items():
        assert_close(value, other.state_dict()[key], rtol=0, atol=0)
        assert not torch.equal(value, before[key])


def test_schedules_reach_both() -> None:
    net, optimizer = build()
    before = copy.deepcopy(net.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    descend(net, optimizer, 0, 2)
    for key, value in net.state_dict().items():
        assert_close(value, before[key], rtol=0, atol=0)


def test_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    whole, optimizer = build()
    descend(whole, optimizer, 0, 6)
    net, optimizer = build()
    descend(net, optimizer, 0, 3)
    folder = checkpoint.save(tmp_path, 3, {"net": net}, {}, {"optimizers": {"main": optimizer.state_dict()}}, {}, 1)
    net, optimizer = build()
    state = checkpoint.load(folder, {"net": net}, {})
    checkpoint.load_optimizers(folder, state["optimizers"], {"main": optimizer})
    descend(net, optimizer, 3, 6)
    for key, value in net.state_dict().items():
        assert_close(value, whole.state_dict()[key], rtol=0, atol=0)


def test_descends() -> None:
    net, optimizer = build()
    first = descend(net, optimizer, 0, 1)
    assert descend(net, optimizer, 1, 200) < 0.1 * first


def test_closure_is_refused() -> None:
    with pytest.raises(ValueError, match="takes no closure"):
        build()[1].step(lambda: 0.0)


def test_old_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ImportError, match=r"needs torch 2\.9 or newer"):
        muon_with_adamw([], [], 0.1, (0.9, 0.99), 0.0)


def test_muon_of_a_kernel_is_muon_of_its_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(6, 2, 3, 3, generator=generator), [torch.randn(6, 2, 3, 3, generator=generator) for _ in range(4)]
    kernel, matrix = nn.Parameter(start.clone()), nn.Parameter(start.flatten(1).clone())
    ours = FlatMuon([kernel], lr=0.02, weight_decay=0.1)
    theirs = torch.optim.Muon([matrix], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for i, gradient in enumerate(gradients):
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["lr"] = 0.02 / (i + 1)
        kernel.grad, matrix.grad = gradient.clone(), gradient.flatten(1).clone()
        ours.step()
        theirs.step()
        if i == 1:  # a run that stops and goes on
            saved = ours.state_dict()
            ours = FlatMuon([kernel], lr=0.02, weight_decay=0.1)
            ours.load_state_dict(saved)
    torch.testing.assert_close(kernel.flatten(1), matrix, rtol=0, atol=0)


def test_kernels_of_some_submodules_are_told_from_the_rest() -> None:
    module = nn.ModuleDict({"enc": nn.Conv2d(2, 4, 3), "out": nn.Conv2d(4, 2, 3)})
    matrices, rest = kernels(module, ("enc.",))
    assert [tuple(p.shape) for p in matrices] == [(4, 2, 3, 3)] and len(rest) == 3


def test_a_moved_parameter_is_noticed() -> None:
    kernel = nn.Parameter(torch.randn(2, 2))
    muon = FlatMuon([kernel], lr=0.1, weight_decay=0.0)
    kernel.data = kernel.data.clone()
    kernel.grad = torch.ones(2, 2)
    with pytest.raises(RuntimeError, match="moved after the optimizer was built"):
        muon.step()
