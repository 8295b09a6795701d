"""Speed of genkit against the plain order of computation, on the same random weights in the same run.

    python eval/benchmark.py enat --threads 1                       # the published comparison size: 16 blocks x 768, 256 tokens, 8 steps
    python eval/benchmark.py enat --threads 1 --dtype bfloat16      # half-precision weights against fp32 weights under autocast
    python eval/benchmark.py enat --device cuda --dtype bfloat16 --batch_size 64 --compiled true
    python eval/benchmark.py search --threads 1                     # nearest of 262,144 codes for 4,096 tokens of width 128
    python eval/benchmark.py stage2 --threads 1                     # 1,024 codes one by one, 8 blocks x 512
    python eval/benchmark.py vit_tokenizer --threads 1              # ViT-VQGAN base encoder at 256 pixels; also --dtype bfloat16
    python eval/benchmark.py conv_tokenizer --threads 1             # SimVQ's decoder at 128 pixels; also --part encode
    python eval/benchmark.py tiles --threads 1                      # large pictures through a tokenizer, whole and in tiles; with memory
    python eval/benchmark.py attend --threads 1                     # fused attention kernel against the written-out softmax
    OMP_NUM_THREADS=1 python eval/benchmark.py frechet --threads 1  # Frechet distance against scipy's matrix root; also --samples 500
    python eval/benchmark.py inception --threads 1                  # FID features against the plain fp32 loop; --files 64 with decoding
    python eval/benchmark.py heun --threads 1                       # EDM's sampler against the plain loop, official CIFAR-10 size
    python eval/benchmark.py distill --threads 1                    # SIM's steps against the naive way: seconds and memory
    python eval/benchmark.py vdt --threads 1                        # VDT-S/2, 16 frames of 32x32 latents; also --dtype bfloat16
    python eval/benchmark.py volume FOLDER data/lowpoly/test.parquet --threads 1   # decoders and heads of a shape VAE
    python eval/benchmark.py shape --threads 1                      # sampling of a shape's latents with guidance
    python eval/benchmark.py mesh --threads 1                       # tokens of MeshAnything V2 at contexts of 300 to 4,500
    python eval/benchmark.py mesh_tokens                            # a mesh of 1,280 faces to tokens and back
    python eval/benchmark.py blocks --threads 1                     # every mixer at 256, 1,024 and 4,096 tokens; also --backward true
    python eval/benchmark.py forms --threads 1                      # mixers as released against the form here: seconds and memory

Prints the machine, threads, dtype, and of each way the median and the spread. The tokens of both ways must be equal in float32.
"""

from _bench_blocks import blocks
from _bench_distill import distill, heun
from _bench_enat import attend, enat, search
from _bench_eval import frechet, inception
from _bench_forms import forms
from _bench_mesh import mesh, mesh_tokens
from _bench_shape import shape
from _bench_tokens import conv_tokenizer, stage2, tiles, vit_tokenizer
from _bench_vdt import vdt
from _bench_volume import volume
from jsonargparse import auto_cli

if __name__ == "__main__":
    parts = [enat, search, attend, frechet, inception, heun, distill, vdt, volume, shape, mesh, mesh_tokens]
    parts += [stage2, vit_tokenizer, conv_tokenizer, tiles, blocks, forms]
    auto_cli({part.__name__: part for part in parts})
