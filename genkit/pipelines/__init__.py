"""Pipelines, one file per task, and what they share: loading (`base`), outputs and seeds."""
