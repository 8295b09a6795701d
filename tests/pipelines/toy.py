"""Small parts of pipelines."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from genkit.tasks.text_encoder import train_tokenizer
from genkit.tokenizers.vit_vqgan import ViTVQModel


def toy_tokenizer() -> ViTVQModel:
    """Return an image tokenizer with random weights: 2x2 pixels a token, latents of 4 channels."""
    torch.manual_seed(0)
    tower = {"dim": 16, "depth": 1, "heads": 1, "mlp_dim": 16, "dim_head": 16}
    codes = {"name": "simvq", "codebook_size": 32, "dim": 4}
    return ViTVQModel(patch_size=2, encoder_config=tower, decoder_config=tower, quantizer_config=codes, sample_size=8).eval()


def text_parts(width: int = 6) -> dict[str, Any]:
    """Return a text encoder with random weights, and its tokenizer."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["a golden chest", "a table"], 260, 8)
    sizes = {"hidden_size": 12, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": width}
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=8, **sizes, **ids)
    return {"text_encoder": CLIPTextModelWithProjection(config).eval(), "tokenizer": tokenizer}
