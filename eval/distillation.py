"""Teacher and students side by side: network calls, seconds per picture, Frechet distance to the same pictures.

    python eval/distillation.py --teacher genkit/edm-lowpoly --students genkit/sim-lowpoly runs/dmd-lowpoly/export \
        --real data/lowpoly/train.parquet --views 2 14 --sheet sheet.png --curves runs/sim-lowpoly runs/dmd-lowpoly

Picture i has prompt i modulo their number and seed i, for every model. Features are EfficientNet-Lite0's at the pictures' own size, so the
distance is not FID; intervals are 95 %, by a jackknife over ten groups of generated pictures. `--sheet` shows the models below each other,
columns from the same latents. `--curves` prints the distances that runs measured on the way (`train.evaluate_every`).

"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genkit import GenPipeline
from genkit.cli._pictures import grid
from genkit.data.prompts import PromptBuilder
from genkit.data.views import ViewDataset
from genkit.eval.assets import bootstrap_mean, caption_hits
from genkit.eval.features import FeatureNetwork
from genkit.eval.frechet import GaussianStatistics, frechet_distance, merged
from genkit.eval.metrics import GROUPS, QUANTILE, jackknife

CURVES = ("eval/fid", "eval/frechet")  # how runs log the distance to real pictures
SHEET_PROMPTS = (
    "a treasure chest", "a wooden table", "a barrel", "a tree", "a chair", "a red car", "a pumpkin", "a stone wall", "a candle", "a burger",
)  # fmt: skip


def sheet(pipes: dict[str, Any], prompts: list[str], path: Path, teacher: str, steps: int | None) -> None:
    """Write the pictures of every model, a row each, columns with the same prompt and latents."""
    rows = []
    for name, pipe in pipes.items():
        pipe.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": steps} if steps is not None and name == teacher else {}
        rows += pipe(list(prompts), generator=list(range(len(prompts))), **options).images
    grid(rows, len(prompts)).save(path)
    print(f"{path}: {', '.join(pipes)}\n")


def curves(folders: list[Path]) -> None:
    """Print the distances that runs measured on the way, step by step."""
    found: dict[str, dict[int, float]] = {}
    for folder in folders:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        found[folder.name] = {line["step"]: value for line in lines for key, value in line.items() if key.startswith(CURVES)}
    steps = sorted({step for values in found.values() for step in values})
    print("| step |", " | ".join(found), "|")
    print("|---" * (len(found) + 1) + "|")
    for step in steps:
        print(f"| {step} |", " | ".join(f"{values[step]:.0f}" if step in values else "" for values in found.values()), "|")
    print()


class Calls:
    """Counts evaluations of a pipeline's network per picture."""

    def __init__(self, network: nn.Module) -> None:
        self.rows = 0
        self.handle = network.register_forward_hook(self._count)

    def _count(self, module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        self.rows += len(args[0])


def measure(pipe: Any, prompts: list[str], count: int, batch: int, network: FeatureNetwork, steps: int | None) -> dict[str, Any]:
    """Make pictures and return their features, calls and seconds per picture."""
    calls, features, seconds = Calls(pipe.unet), [], 0.0
    pipe.set_progress_bar_config(disable=True)
    options = {} if steps is None else {"num_inference_steps": steps}
    for start in range(0, count, batch):
        rows = range(start, min(start + batch, count))
        asked = [prompts[i % len(prompts)] for i in rows]
        began = time.perf_counter()
        images = pipe(asked, generator=list(rows), output_type="pt", samples_at_once=batch, **options).images
        seconds += time.perf_counter() - began
        features.append(network.features((images * 127.5 + 128).clamp(0, 255).byte().float() / 127.5 - 1))
    calls.handle.remove()
    return {"features": torch.cat(features), "calls": calls.rows / count, "seconds": seconds / count}


def distance(real: GaussianStatistics, features: Tensor) -> tuple[float, float]:
    """Return the Frechet distance and half the width of its interval."""
    groups = []
    for g in range(GROUPS):
        stats = GaussianStatistics(features.shape[1], real.source)
        stats.update(features[g::GROUPS])
        groups.append(stats)
    value = frechet_distance(real, merged(groups))
    return value, QUANTILE * math.sqrt(jackknife(groups, lambda rest: frechet_distance(real, rest)))


@torch.inference_mode()
def main() -> None:
    """Parse the command line, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="packaged name or folder")
    parser.add_argument("--students", nargs="*", default=[], help="packaged names or folders")
    parser.add_argument("--real", required=True, help="parquet file of the training views")
    parser.add_argument("--views", nargs="*", type=int, help="views of the reference; all if left out")
    parser.add_argument("--num-samples", type=int, default=2480)
    parser.add_argument("--batch-size", type=int, default=62)
    parser.add_argument("--teacher-steps", type=int, help="Heun steps; the model's default if left out")
    parser.add_argument("--sheet", type=Path, help="picture of the models' answers to some prompts, a row each")
    parser.add_argument("--sheet-prompts", nargs="*", default=SHEET_PROMPTS)
    parser.add_argument("--curves", nargs="*", default=[], help="run folders")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.curves:
        curves([Path(folder) for folder in args.curves])
    network = FeatureNetwork("efficientnet-lite0", size=None)
    pipes = {name: GenPipeline.from_pretrained(name) for name in (args.teacher, *args.students)}
    if args.sheet:
        sheet(pipes, args.sheet_prompts, args.sheet, args.teacher, args.teacher_steps)
    size = pipes[args.teacher].image_size[0]
    views = ViewDataset(args.real, size)
    rows = [i for i in range(len(views)) if args.views is None or views.view_of(i) in args.views]
    builder = PromptBuilder.from_views(views)
    prompts = [builder.plain(o) for o in range(views.num_objects)]
    parts = [network.features(torch.stack([views[i]["image"] for i in rows[k : k + 64]])) for k in range(0, len(rows), 64)]
    real = torch.cat(parts)
    reference = GaussianStatistics(real.shape[1], f"efficientnet-lite0, {size} px")
    reference.update(real)
    everything = network_features(views, network) if len(rows) < len(views) else real
    found = {}
    for name, pipe in pipes.items():
        made = measure(pipe, prompts, args.num_samples, args.batch_size, network, args.teacher_steps if name == args.teacher else None)
        value, reach = distance(reference, made["features"])
        objects = [i % views.num_objects for i in range(args.num_samples)]
        hits = caption_hits(made["features"], [views.captions[o] for o in objects], everything, views)
        retrieval = bootstrap_mean(hits, objects)
        found[name] = {"calls": made["calls"], "seconds": made["seconds"], "frechet": value, "ci": [value - reach, value + reach]}
        found[name] |= {"retrieval": retrieval.value, "retrieval_ci": [retrieval.low, retrieval.high]}
    if args.json:
        print(json.dumps({"num_real": len(rows), "num_fake": args.num_samples, "models": found}))
        return
    print(f"{len(rows)} real pictures, {args.num_samples} of each model; features {reference.source}; {torch.get_num_threads()} threads")
    print("| model | network calls | s per picture | Frechet distance | caption retrieval |\n|---|---|---|---|---|")
    for name, r in found.items():
        label = name if name.startswith("genkit/") else Path(name).parent.name if Path(name).name == "export" else Path(name).name
        interval = f"[{r['ci'][0]:.1f}, {r['ci'][1]:.1f}]"
        caption = f"{r['retrieval']:.3f} [{r['retrieval_ci'][0]:.3f}, {r['retrieval_ci'][1]:.3f}]"
        print(f"| {label} | {r['calls']:.0f} | {r['seconds']:.4f} | {r['frechet']:.1f} {interval} | {caption} |")


def network_features(views: ViewDataset, network: FeatureNetwork) -> Tensor:
    """Return the features of all views, for caption retrieval."""
    starts = range(0, len(views), 64)
    return torch.cat([network.features(torch.stack([views[i]["image"] for i in range(k, min(k + 64, len(views)))])) for k in starts])


if __name__ == "__main__":
    main()
