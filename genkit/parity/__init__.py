"""Runners of the golden cases, one file per system, behind `genkit verify`."""
