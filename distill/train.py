"""Distil a trained pipeline: `accelerate launch distill/train.py --config distill/recipes/sim_lowpoly.yaml`."""

from pathlib import Path

from genkit.training.launch import main

if __name__ == "__main__":
    raise SystemExit(main(recipe_dir=Path(__file__).parent / "recipes"))
