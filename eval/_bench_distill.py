"""EDM's sampler and the steps of score implicit matching, each against the plain order of computation, on the same random networks."""

import copy
import weakref
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self, cast

import torch
from _timing import machine, report, timed
from torch import Tensor, nn

from genkit.distill.denoising import Denoiser, denoising_loss
from genkit.distill.levels import KarrasLevels, LogNormalLevels, edm_weight
from genkit.distill.matching import SIM, constant, hand_over, matching_gradient, matching_loss
from genkit.generators.edm import SIZES, EDMUNet2DModel
from genkit.pipelines.edm import EDMPipeline
from genkit.schedulers.edm_heun import EDMHeunScheduler


class ActivationMeter:
    """Counts the bytes that autograd keeps for the backward pass: distinct storages, parameters left out.

    Attributes:
        peak: most bytes at a time.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self.ignored = {t.untyped_storage().data_ptr() for module in modules for t in [*module.parameters(), *module.buffers()]}
        self.users: dict[int, int] = {}
        self.held = self.peak = 0

    def __enter__(self) -> Self:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda box: box.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.hooks.__exit__(kind, error, trace)

    def _pack(self, tensor: Tensor) -> Any:
        box, storage = _Box(tensor), tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place in self.ignored:
            return box
        self.users[place] = self.users.get(place, 0) + 1
        if self.users[place] == 1:
            self.held += size
            self.peak = max(self.peak, self.held)
        weakref.finalize(box, self._free, place, size)
        return box

    def _free(self, place: int, size: int) -> None:
        self.users[place] -= 1
        if not self.users[place]:
            self.held -= size


class _Box:
    """A saved tensor; freed with the graph."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _network(size: str, device: str, seed: int) -> EDMUNet2DModel:
    """Return a network of a published size whose every layer acts."""
    torch.manual_seed(seed)
    model = EDMUNet2DModel(**{**SIZES[size], "unet_config": {**SIZES[size]["unet_config"], "dropout": 0.0}})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and name.rsplit(".", 2)[1] in ("conv1", "proj", "out_conv"):
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return model.to(device)


def heun(
    size: str = "cifar10_vp",
    steps: int = 6,
    batch: int = 2,
    device: str = "cpu",
    dtype: Literal["float32", "bfloat16"] = "float32",
    compiled: bool = False,
    threads: int = 0,
    repeats: int = 3,
) -> None:
    """Time EDM's sampler: Algorithm 2 as it reads, around the plain network, against EDMPipeline.

    Args:
        size: published size, key of `genkit.generators.edm.SIZES`.
        steps: N, 2 N - 1 evaluations.
        batch: pictures at once, in both ways.
        device: cpu, cuda or mps.
        dtype: of our weights; the plain way keeps fp32.
        compiled: also time our way with torch.compile on the blocks.
        threads: CPU threads; 0 leaves PyTorch's choice.
        repeats: timed runs of each way.
    """
    if threads:
        torch.set_num_threads(threads)
    plain_model = _network(size, device, 0).eval().requires_grad_(False)
    model = copy.deepcopy(plain_model).to(getattr(torch, dtype))
    pipe = EDMPipeline(model, EDMHeunScheduler())
    seeds = list(range(batch))

    @torch.no_grad()
    def plain() -> Tensor:
        x = torch.stack([torch.randn(3, *pipe.image_size, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        i = torch.arange(steps, dtype=torch.float64, device=device)
        t = (80 ** (1 / 7) + i / (steps - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        t = torch.cat([t, torch.zeros_like(t[:1])])
        x = x.to(device).double() * t[0]
        for k in range(steps):
            d = (x - plain_model(x, t[k].float()).sample.double()) / t[k]
            after = x + (t[k + 1] - t[k]) * d
            if k < steps - 1:
                second = (after - plain_model(after, t[k + 1].float()).sample.double()) / t[k + 1]
                after = x + (t[k + 1] - t[k]) * (0.5 * d + 0.5 * second)
            x = after
        return x.float()

    def ours() -> Tensor:
        states = pipe.iterate(num_images_per_prompt=batch, num_inference_steps=steps, generator=seeds, samples_at_once=batch)
        return list(states)[-1].sample.float()

    print(machine(device))
    print(f"EDM {size}, {steps} Heun steps, {2 * steps - 1} evaluations, batch {batch}, {dtype}, {device}")
    timings = timed({"plain loop": plain, "genkit": ours}, repeats, device)
    if compiled:
        model.compile_repeated_blocks(fullgraph=True, dynamic=True)
        timings |= timed({"genkit, compiled": ours}, repeats, device)
    report(timings, batch, "pictures")


def distill(
    size: str = "cifar10_vp",
    batch: int = 2,
    device: str = "cpu",
    dtype: Literal["float32", "bfloat16"] = "float32",
    threads: int = 0,
    repeats: int = 2,
) -> None:
    """Time one critic and one student update of SIM, and count the activations that autograd keeps, the naive way and ours.

    Naive: new pictures for each update, and one graph through student, critic and teacher. Ours: the critic's pictures serve the student
    too, one network's graph at a time, the student's own graph last. Gradients are the same.

    Args:
        size: published size, key of `genkit.generators.edm.SIZES`.
        batch: pictures.
        device: cpu or cuda.
        dtype: of autocast; losses stay in fp32.
        threads: CPU threads; 0 leaves PyTorch's choice.
        repeats: timed runs of each way.
    """
    if threads:
        torch.set_num_threads(threads)
    student, critic, teacher = (_network(size, device, seed) for seed in range(3))
    teacher.requires_grad_(False)
    shape = (batch, 3, SIZES[size]["sample_size"], SIZES[size]["sample_size"])
    generator = torch.Generator().manual_seed(0)
    z, other_z, noise, critic_noise = (torch.randn(shape, generator=generator).to(device) for _ in range(4))
    sigma = KarrasLevels().sigma(torch.rand(batch, generator=generator)).to(device)
    critic_sigma = LogNormalLevels().sigma(torch.randn(batch, generator=generator)).to(device)
    rule, networks = SIM(), (student, critic, teacher)

    def at(network: EDMUNet2DModel) -> Denoiser:
        return lambda x, level: network(x, level).sample

    def picture(z: Tensor) -> Tensor:
        return cast(Tensor, student(2.5 * z, 2.5).sample)

    def critic_update(clean: Tensor) -> None:
        loss = denoising_loss(at(critic), clean, critic_noise, critic_sigma, edm_weight(critic_sigma)).mean()
        loss.backward()
        critic.zero_grad(set_to_none=True)

    def naive() -> Tensor:
        with torch.no_grad():
            clean = picture(other_z)
        critic_update(clean)
        with constant(critic):
            losses, _ = matching_loss(rule, picture(z), noise, sigma, at(critic), at(teacher))
        (losses.sum() / noise.numel()).backward()
        return finish()

    def ours() -> Tensor:
        with torch.no_grad():
            clean = picture(z)
        critic_update(clean)
        with constant(critic):
            losses, gradient, _ = matching_gradient(rule, clean, noise, sigma, at(critic), at(teacher))
        hand_over(picture(z), gradient / noise.numel(), losses.sum() / noise.numel()).backward()
        return finish()

    def finish() -> Tensor:
        gradients = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
        for network in networks:
            network.zero_grad(set_to_none=True)
        return gradients

    def run(way: Callable[[], Tensor]) -> Tensor:
        with torch.autocast(torch.device(device).type, dtype=getattr(torch, dtype), enabled=dtype != "float32"):
            return way()

    print(machine(device))
    print(f"SIM on EDM {size}, one critic and one student update, batch {batch}, {dtype}, {device}")
    ways = {"naive": naive, "genkit": ours}
    peaks = {}
    for name, way in ways.items():
        with ActivationMeter(*networks) as meter:
            run(way)
        peaks[name] = meter.peak
    for name, peak in peaks.items():
        print(f"{name:21} activations {peak / 1e6:.0f} MB, {peak / peaks['naive']:.2f} of the naive way")
    report(timed({name: partial(run, way) for name, way in ways.items()}, repeats, device), batch, "pictures")
