"""What smaller weights cost a picture generator: integers and pruned widths, as they come and after a short training.

    python eval/compression.py --model genkit/enat-lowpoly --train data/lowpoly/train.parquet --steps 300 --out runs/compression

Size is that of the generator's weights alone: two bytes each as packaged; in the rows of integers those of the linear maps (of all, or
"blocks": of the blocks) take the bits named, and one scale of two bytes a row. Rows of int8 are real integers (`to_int8`, by torchao); the
others are rounded floats, as `genkit.blocks.integer` trains them, so that their seconds say nothing and are left out. Ranges of
inputs are those of the first training batches.

Pruning cuts hidden units of the MLPs by saliency on training batches (`genkit.blocks.pruning`). "trained on" means so many steps of the
packaged model's recipe from there. Distance: Frechet's to the views the model learned from, on EfficientNet-Lite0's features (not FID);
seconds of one picture, median, the whole call.
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from _timing import machine
from _views import ViewJudge
from torch import nn
from torch.utils.data import DataLoader

from genkit import GenPipeline
from genkit.blocks.integer import FakeQuantLinear, add_fake_quant, to_int8
from genkit.blocks.pruning import Saliency, pruned
from genkit.data.prompts import PromptBuilder
from genkit.paths import pretrained_dir, recipes_dir
from genkit.tasks import enat
from genkit.training import launch
from genkit.training.loop import Trainer
from genkit.training.task import StepContext

RECIPE, TEXT, TEXT_PARTS = "enat_lowpoly.yaml", "text-lowpoly", ("text_encoder", "tokenizer")
BATCHES = 16  # for ranges and saliency
BITS, SHARES = (8, 4, 3), (0.75, 0.5, 0.25)
KINDS = ("integers", "pruning")


class Bench:
    """The model, its recipe and the judge.

    Args:
        args: the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.pipe = args, GenPipeline.from_pretrained(args.model)
        self.recipe = launch.read_recipe(recipes_dir() / "pipelines" / "recipes" / RECIPE)
        self.task = self.build()
        self.judge = ViewJudge(args.train, self.task.config.views)
        builder = PromptBuilder.from_views(self.judge.views)
        self.prompts = [builder.plain(number) for number in range(self.judge.views.num_objects)]

    def overrides(self) -> list[str]:
        """Return what the packaged model's parts change in the recipe."""
        args = self.args
        task = {"data": args.train, "vqvae": args.model, "lr": args.lr} | {part: pretrained_dir() / TEXT / part for part in TEXT_PARTS}
        train = {"steps": args.steps, "warmup": min(20, args.steps), "ema_decay": 0.98, "sample_every": 0}
        pairs = {f"--task_config.{key}": value for key, value in task.items()} | {f"--train.{key}": value for key, value in train.items()}
        return [text for key, value in pairs.items() for text in (key, str(value))]

    def build(self, *more: str) -> enat.ENATTask:
        """Return the task."""
        _, config, _ = launch.resolve(self.recipe, None, [*self.overrides(), *more])
        return enat.build(config)

    def train(self, name: str, network: Any, *more: str) -> Any:
        """Train a network on; return the generator that was exported."""
        folder = self.args.out / name
        network.save_pretrained(folder / "start")
        options = [*self.overrides(), "--task_config.start", str(folder / "start"), "--train.out", str(folder / "run"), *more]
        if network.config["stack"] is not None:
            options += ["--task_config.model.stack", network.config["stack"]]
        _, config, train = launch.resolve(self.recipe, None, options)
        Trainer(enat.build(config), train).run()
        return GenPipeline.from_pretrained(folder / "run" / "export").transformer  # type: ignore[attr-defined]

    def batches(self, network: nn.Module, learn: bool) -> Any:
        """Yield after each step of some training batches through a network, with gradients if it is to learn."""
        self.task.modules["transformer"] = network
        average = {"transformer": copy.deepcopy(network).eval().requires_grad_(False)}
        loader = DataLoader(self.task.dataset(), 32, shuffle=True, generator=torch.Generator().manual_seed(0))
        for step, batch in zip(range(BATCHES), loader, strict=False):
            network.zero_grad()
            with torch.set_grad_enabled(learn):
                for phase in self.task.step(batch, StepContext(step, 5, torch.device("cpu"), average)):
                    if learn:
                        phase.loss.backward()  # type: ignore[no-untyped-call]
            yield step

    @torch.no_grad()
    def pictures(self, chosen: range) -> torch.Tensor:
        """Return pictures [b, 3, h, w] in [-1, 1] of the pipeline as it is."""
        pipe: Any = self.pipe
        *_, last = pipe.iterate([self.prompts[i % len(self.prompts)] for i in chosen], generator=list(chosen))
        images: torch.Tensor = pipe.decode(last.sample).clamp(-1, 1)
        return images

    def row(self, name: str, network: Any, size: float, timed: bool = True) -> None:
        """Measure a generator and print its row; `size` is in bytes."""
        pipe: Any = self.pipe
        pipe.register_modules(transformer=network.eval())
        clocks = []
        for i in range(1 + self.args.timed if timed else 0):
            began = time.perf_counter()
            self.pictures(range(i, i + 1))
            clocks.append(time.perf_counter() - began)
        shown = f"{statistics.median(clocks[1:]):.3f}" if timed else ""
        print(f"| {name} | {size / 1e6:.2f} | {shown} | {self.judge.distance(self.pictures, self.args.num_samples):.0f} |", flush=True)


def size_of(network: nn.Module, bits: int = 16, inside: str = "blocks") -> float:
    """Return bytes of weights, those of the linear maps of a part ("": of all) with so many bits and a scale a row."""
    total = 2.0 * sum(p.numel() for p in network.parameters())
    if bits < 16:
        for part in network.get_submodule(inside).modules():
            if isinstance(part, nn.Linear):
                total += part.weight.numel() * (bits / 8 - 2) + 2 * part.out_features
    return total


def main() -> None:
    """Parse the command line, compress, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="genkit/enat-lowpoly", help="ENAT pipeline of that recipe (default: %(default)s)")
    parser.add_argument("--train", required=True, help="parquet file of the training views")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--rows", nargs="+", choices=KINDS, default=KINDS, help="beside the packaged model (default: all)")
    parser.add_argument("--steps", type=int, default=300, help="of each training (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=5e-4, help="of these trainings (default: %(default)s)")
    parser.add_argument("--num-samples", type=int, default=620, help="pictures of each row (default: %(default)s)")
    parser.add_argument("--timed", type=int, default=20, help="pictures whose seconds are measured (default: %(default)s)")
    args = parser.parse_args()
    bench = Bench(args)
    net: Any = copy.deepcopy(bench.pipe.transformer)  # type: ignore[attr-defined]
    print(f"{machine('cpu')}; {bench.judge.count} real views, {args.num_samples} pictures a row, trainings of {args.steps} steps\n")
    print("| generator | MB | s per picture | Frechet distance |\n|---|---|---|---|")
    bench.row("as packaged", net, size_of(net))
    if "integers" in args.rows:
        integers(bench, net)
    if "pruning" in args.rows:
        pruning(bench, net)


def integers(bench: Bench, net: Any) -> None:
    """Print the rows of integers."""
    for name, inputs in (("int8 weights", False), ("int8 weights and inputs", True)):
        bench.row(name, to_int8(copy.deepcopy(net), inputs), size_of(net, 8, ""))
    for bits in BITS:
        rounded = copy.deepcopy(net)
        add_fake_quant(rounded, bits)
        for part in rounded.modules():  # ranges alone: dropout and the like stay off
            part.training = isinstance(part, FakeQuantLinear)
        for _ in bench.batches(rounded, learn=False):
            pass
        bench.row(f"{bits} bits, blocks", rounded, size_of(net, bits), timed=False)
    bench.row("3 bits, blocks, trained on; inputs exact", bench.train("3-bits", net, "--task_config.fake_quant", json.dumps({"bits": 3})),
              size_of(net, 3), timed=False)  # fmt: skip


def pruning(bench: Bench, net: Any) -> None:
    """Print the rows of pruned widths."""
    saliency = Saliency(net)
    for _ in bench.batches(net, learn=True):
        saliency.update()
    net.zero_grad()
    for share in SHARES:
        small = pruned(net, saliency.keep(share))
        bench.row(f"{share:.0%} of the hidden units", small, size_of(small))
        bench.row(f"{share:.0%} of the hidden units, trained on", bench.train(f"pruned-{share:g}", small), size_of(small))


if __name__ == "__main__":
    main()
