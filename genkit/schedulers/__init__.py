"""Schedulers that diffusers does not have."""
