"""Shared efficient transformer blocks: attention, feed-forward, norms, embeddings, modulation, caches and the stack string."""
