"""Tiny real pipelines: a class model and a text model of 6x4 tokens, random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast

from genkit.generators.enat import ENATTransformer2DModel
from genkit.pipelines.enat import ENATPipeline
from genkit.schedulers.masked_token import MaskedTokenScheduler
from genkit.tokenizers.vit_vqgan import ViTVQModel

CODES = 24
LABELS = {0: "treasure chest, chest", 1: "wooden table", 2: "bed"}


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Give every weight a random value, so that layers that start at zero matter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * (0.25 if parameter.ndim > 1 else 0.1)


def make_vqvae(codes: int = CODES) -> ViTVQModel:
    tower = {"dim": 16, "depth": 1, "heads": 2, "mlp_dim": 24, "dim_head": 8}
    quantizer = {"name": "simvq", "codebook_size": codes, "dim": 8}
    model = ViTVQModel(patch_size=4, encoder_config=tower, decoder_config=tower, quantizer_config=quantizer).eval()
    randomise(model, 2)
    return model


def make_transformer(**options: Any) -> ENATTransformer2DModel:
    sizes = {
        "sample_size": [6, 4],
        "hidden_size": 24,
        "num_heads": 3,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "codebook_size": CODES,
    }
    model = ENATTransformer2DModel(**{**sizes, "num_classes": 3, **options}).eval()
    randomise(model, 3)
    return model


def make_text_encoder() -> tuple[CLIPTextModelWithProjection, PreTrainedTokenizerFast]:
    words = ["<pad>", "<bos>", "<eos>", "a", "wooden", "table", "treasure", "chest", "red", "bed"]
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", model_max_length=8)
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=12,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    encoder = CLIPTextModelWithProjection(config).eval()
    randomise(encoder, 4)
    return encoder, tokenizer


def make_class_pipe() -> ENATPipeline:
    pipe = ENATPipeline(make_transformer(), make_vqvae(), MaskedTokenScheduler(mask_token_id=CODES), id2label=LABELS, num_inference_steps=4)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_text_pipe() -> ENATPipeline:
    encoder, tokenizer = make_text_encoder()
    transformer = make_transformer(num_classes=None, text_dim=16, pooled_dim=12, shared_modulation=True)
    pipe = ENATPipeline(transformer, make_vqvae(), MaskedTokenScheduler(mask_token_id=CODES), encoder, tokenizer, num_inference_steps=4)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def class_pipe() -> ENATPipeline:
    return make_class_pipe()


@pytest.fixture(scope="session")
def text_pipe() -> ENATPipeline:
    return make_text_pipe()


@pytest.fixture(params=["class", "text"])
def pipe(request: pytest.FixtureRequest) -> ENATPipeline:
    fixture: ENATPipeline = request.getfixturevalue(f"{request.param}_pipe")
    return fixture


@pytest.fixture
def prompts(pipe: ENATPipeline) -> list[str]:
    return ["a wooden table", "red bed", "treasure chest"] if pipe.is_text_model else ["wooden table", "bed", "chest"]
