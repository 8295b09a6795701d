"""Text as generators take it: what a CLIP-like text encoder of transformers makes of it, ours or a standard one.

Letters: b texts, m text tokens, d width of a text token, p width of the pooled text.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

logger = logging.getLogger(__name__)

MAX_TEXTS_SHOWN = 3  # in a warning about all of them


@dataclass(frozen=True)
class EncodedText:
    """Text as a generator takes it.

    Args:
        tokens: [b, m, d] last hidden states.
        mask: [b, m] bool, True = real token.
        pooled: [b, p] projected text feature.
    """

    tokens: Tensor
    mask: Tensor
    pooled: Tensor


def warn_of_long(texts: Sequence[str], tokenizer: Any) -> None:
    """Log how many of some texts are longer than the encoder reads, and which."""
    length = tokenizer.model_max_length
    long = [text for text in texts if len(tokenizer(text).input_ids) > length]
    if long:
        shown = ", ".join(map(repr, long[:MAX_TEXTS_SHOWN])) + (", ..." if len(long) > MAX_TEXTS_SHOWN else "")
        logger.warning("%d of %d prompts cut to %d tokens, the most the text encoder takes: %s", len(long), len(texts), length, shown)


def encode_text(texts: Sequence[str], tokenizer: Any, text_encoder: Any, warn: bool = True) -> EncodedText:
    """Run a CLIP-like text encoder.

    Every text is padded to the tokenizer's `model_max_length`, so that a result does not depend on the other texts.

    Args:
        texts: b texts.
        tokenizer: of the encoder.
        text_encoder: module with `last_hidden_state` and `text_embeds`, as `CLIPTextModelWithProjection`.
        warn: log which texts are cut.
    """
    if warn:
        warn_of_long(texts, tokenizer)
    batch = tokenizer(
        list(texts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    device = next(text_encoder.parameters()).device
    mask = batch.attention_mask.to(device)
    output = text_encoder(input_ids=batch.input_ids.to(device), attention_mask=mask)
    return EncodedText(output.last_hidden_state, mask.bool(), output.text_embeds)


def condition_vector(pooled: Tensor) -> Tensor:
    """Return pooled text [b, p] as the condition of networks that take one vector: rows of length 1, as one-hot rows have, fp32."""
    return F.normalize(pooled.float(), dim=-1)
