"""Schedulers by name: exact tables, settings, bad names."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from genkit.schedulers.gaussian import make_betas
from genkit.schedulers.named import SOLVERS, noise_scheduler


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_tables_are_exact(name: str, schedule: str) -> None:
    found = noise_scheduler(name, schedule=schedule).alphas_cumprod
    assert found.dtype == torch.float64
    assert_close(found, (1 - make_betas(schedule, 1000)).cumprod(0), rtol=1e-12, atol=0)


def test_settings() -> None:
    assert noise_scheduler("ddpm", learn_sigma=False).config["variance_type"] == "fixed_large"
    assert noise_scheduler("ddim", clip=True).config["clip_sample"]
    assert noise_scheduler("DPMSolverSinglestepScheduler", solver_order=1).config["solver_order"] == 1


def test_bad_names_and_options_are_refused() -> None:
    with pytest.raises(ValueError, match="ddim"):
        noise_scheduler("dim")
    with pytest.raises(ValueError, match="UNet2DModel"):
        noise_scheduler("UNet2DModel")
    with pytest.raises(ValueError, match="cannot clip"):
        noise_scheduler("euler", clip=True)
    with pytest.raises(TypeError, match="takes no order"):
        noise_scheduler("ddim", order=2)
    with pytest.raises(ValueError, match="squaredcos_cap_v2"):
        noise_scheduler("ddim", schedule="cosine")
