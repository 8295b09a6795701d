"""The numbers of a packaged picture model's card.

    python eval/assets.py tokenizer genkit/enat-lowpoly --train data/lowpoly/train.parquet --test data/lowpoly/test.parquet
    python eval/assets.py generator genkit/enat-lowpoly --train data/lowpoly/train.parquet --images-per-object 4

A tokenizer may also be a folder with `config.json` (`runs/simvq_lowpoly/export/vqvae`). `--json` prints one object.
"""

import argparse
import json
import time
from dataclasses import asdict

import torch

from genkit import GenPipeline
from genkit.data.prompts import PromptBuilder
from genkit.data.views import ViewDataset
from genkit.eval.assets import (
    Estimate,
    batches,
    bootstrap_mean,
    caption_hits,
    half_distance,
    reconstruction_features,
    statistics_of,
)
from genkit.eval.features import FeatureNetwork
from genkit.eval.frechet import frechet_distance
from genkit.eval.retrieval import extract
from genkit.pipelines.tokenizers import load_tokenizer
from genkit.tokenizers.quantizers.stats import CodebookStats

SIZE = 64  # pixels: the models' size, and the judging network's


def judge() -> tuple[FeatureNetwork, str]:
    """Return the judging network and the name of its features."""
    return FeatureNetwork("efficientnet-lite0", size=SIZE), f"efficientnet-lite0 at {SIZE} px"


def tokenizer_report(args: argparse.Namespace) -> dict[str, object]:
    """Measure faithfulness, caption retrieval, code usage and distances of a tokenizer."""
    network, source = judge()
    model = load_tokenizer(args.model)

    def reconstruct(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = model(x)
        return out.sample, out.indices

    train = ViewDataset(args.train, SIZE)
    objects = [train.object_of(i) for i in range(len(train))]
    captions = [train.captions[o] for o in objects]
    real, fake, codes, psnr, _ = reconstruction_features(network, train, reconstruct)
    own = torch.arange(len(train))
    stats = CodebookStats(model.quantizer.codebook_size)
    stats.update(codes)
    report: dict[str, object] = {
        "train views": len(train),
        "caption retrieval, real views": bootstrap_mean(caption_hits(real, captions, real, train, own), objects),
        "caption retrieval, reconstructions": bootstrap_mean(caption_hits(fake, captions, real, train, own), objects),
        "PSNR on train, dB": bootstrap_mean(psnr, objects),
        "codes used on train": stats.compute()["utilisation"],
        "perplexity on train": stats.compute()["perplexity"],
        f"Frechet distance ({source}), reconstructions to real": frechet_distance(statistics_of(real, source), statistics_of(fake, source)),
        f"Frechet distance ({source}), two halves of the objects": half_distance(real, objects, source),
    }
    if args.test:
        test = ViewDataset(args.test, SIZE)
        objects = [test.object_of(i) for i in range(len(test))]
        *_, psnr, ssim = reconstruction_features(network, test, reconstruct)
        report |= {"PSNR on test, dB": bootstrap_mean(psnr, objects), "SSIM on test": bootstrap_mean(ssim, objects)}
    return report


def generator_report(args: argparse.Namespace) -> dict[str, object]:
    """Measure caption retrieval and the Frechet distance of generated pictures, one prompt per training object."""
    network, source = judge()
    pipe = GenPipeline.from_pretrained(args.model)
    train = ViewDataset(args.train, SIZE)
    builder = PromptBuilder.from_views(train)
    count, fake, asked, objects, start = args.images_per_object, [], [], [], time.perf_counter()
    names = ("guidance_scale", "token_temperature", "mask_temperature")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    options |= {"num_inference_steps": args.steps} if args.steps is not None else {}
    for o in range(len(train.captions)):
        seeds = [args.seed + o * count + i for i in range(count)]
        images = pipe(
            builder.plain(o), num_images_per_prompt=count, generator=seeds, output_type="pt", samples_at_once=count, **options
        ).images
        fake.append(network.features(images))
        asked += [train.captions[o]] * count
        objects += [o] * count
    seconds = time.perf_counter() - start
    generated = torch.cat(fake)
    real = extract(network, batches(train))
    hits = caption_hits(generated, asked, real, train)
    return {
        "generated": len(generated),
        "seconds per picture": seconds / len(generated),
        "caption retrieval, generated": bootstrap_mean(hits, objects),
        f"Frechet distance ({source}), generated to real": frechet_distance(statistics_of(real, source), statistics_of(generated, source)),
    }


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("tokenizer", "generator"))
    parser.add_argument("model", help="packaged name or folder")
    parser.add_argument("--train", required=True, help="parquet file of the training views")
    parser.add_argument("--test", help="parquet file of the test views")
    parser.add_argument("--images-per-object", type=int, default=4)
    parser.add_argument("--steps", type=int, help="sampling steps; the model's default if left out")
    parser.add_argument("--guidance-scale", type=float, help="the model's default if left out")
    parser.add_argument("--token-temperature", type=float, help="the model's default if left out")
    parser.add_argument("--mask-temperature", type=float, help="the model's default if left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with torch.inference_mode():
        report = tokenizer_report(args) if args.part == "tokenizer" else generator_report(args)
    if args.json:
        print(json.dumps({k: asdict(v) if isinstance(v, Estimate) else v for k, v in report.items()}))
        return
    for name, value in report.items():
        print(f"{name}: {value if isinstance(value, (Estimate, int)) else f'{value:.3f}'}")


if __name__ == "__main__":
    main()
