"""Train a generator or a text encoder: `accelerate launch pipelines/train.py --config pipelines/recipes/text_lowpoly.yaml`."""

from pathlib import Path

from genkit.training.launch import main

if __name__ == "__main__":
    raise SystemExit(main(recipe_dir=Path(__file__).parent / "recipes"))
