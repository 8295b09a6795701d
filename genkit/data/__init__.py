"""Data sets of pictures and turntable views, prompts built from what the data knows, and token caches on disk."""
