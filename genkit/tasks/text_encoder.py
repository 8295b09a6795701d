"""Train a small text encoder by contrasting prompts with pictures of what they describe.

A CLIP text transformer (`transformers.CLIPTextModelWithProjection`: causal, pooled at the end token, projected) meets frozen
EfficientNet-Lite1 features of the views through one linear layer. Prompts are drawn anew at every step by `PromptBuilder`.

loss = (L(text -> view) + L(view -> text)) / 2
L(t -> v) = -mean_i log(sum over j in P(i) of exp(s t_i . v_j) / sum over all j of exp(s t_i . v_j))

with unit vectors t, v, a learned scale s, and P(i) the pictures of objects with the same caption: asset packs repeat a name over
variants, which must not push each other away.

Source: Radford et al. 2021 (arXiv 2103.00020), section 2.3; several positives as in Miech et al. 2020 (arXiv 1912.06430), equation 1.
Letters: b batch, n tokens, p projected width, d features of the network.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast

from genkit.data.prompts import PromptBuilder
from genkit.data.views import ViewDataset
from genkit.eval.features import FeatureNetwork
from genkit.eval.retrieval import view_features
from genkit.training.task import Phase, StepContext, Task

# The end token must not have id 2: transformers' CLIP takes that id for the mark of an old configuration and pools elsewhere.
SPECIAL = ("<pad>", "<start>", "<unk>", "<end>")
MOST_SCALE = 100.0  # bound of s, as in CLIP


@dataclass
class Config:
    """Settings of the task.

    Attributes:
        data: parquet file, folder or hub id of turntable views with captions.
        image_size: pictures are reduced to this side, in pixels.
        width, layers, heads, mlp_dim, projection: sizes of the transformer and of the pooled text vector.
        positions: most tokens of a prompt, start and end included; what is longer is cut.
        vocab_size: most entries of the tokenizer, at least 260 (all bytes and the special tokens).
        network, feature_size: feature network of the pictures and its working size.
        view_phrases: let prompts tell the side an object is seen from.
        lr: peak learning rate of AdamW; weight_decay: on matrices only, not on tables.
        seed: of the initial weights and of the prompts the tokenizer is trained on.
        cache: folder of decoded pictures and features; the user's cache folder if null.
    """

    data: str = "data/lowpoly/train.parquet"
    image_size: int = 64
    width: int = 128
    layers: int = 3
    heads: int = 4
    mlp_dim: int = 512
    projection: int = 128
    positions: int = 16
    vocab_size: int = 1500
    network: str = "efficientnet-lite1"
    feature_size: int = 96
    view_phrases: bool = True
    lr: float = 1e-3
    weight_decay: float = 0.05
    seed: int = 0
    cache: str | None = None

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads={self.heads}, got {self.width}.")
        if self.vocab_size < 256 + len(SPECIAL):
            raise ValueError(f"vocab_size must be at least {256 + len(SPECIAL)} (all bytes and the special tokens), got {self.vocab_size}.")
        if self.positions < 3:
            raise ValueError(f"positions must be at least 3 (start, one token, end), got {self.positions}.")
        if self.lr <= 0:
            raise ValueError(f"lr must be above 0, got {self.lr}.")


def train_tokenizer(prompts: Iterable[str], vocab_size: int, positions: int) -> PreTrainedTokenizerFast:
    """Train a lower-casing byte-level BPE tokenizer: every text has tokens, frequent words have one.

    Args:
        prompts: texts to learn from; the result depends on them only.
        vocab_size: most entries.
        positions: most tokens of a text, start and end included.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(prompts, trainer)
    marks = [(name, tokenizer.token_to_id(name)) for name in ("<start>", "<end>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=marks)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<start>",
        eos_token="<end>",
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=positions,
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
    )


def tokenizer_prompts(builder: PromptBuilder, seed: int, per_object: int = 40) -> Iterator[str]:
    """Yield the prompts a tokenizer learns from: draws of every object, and every word once."""
    for i in range(len(builder.captions)):
        yield builder.plain(i)
        for k in range(per_object):
            yield builder.build(i, k % builder.num_views, (seed * 1_000_003 + i) * per_object + k)
    yield from builder.all_words()


class TextViewModel(nn.Module):
    """The text transformer beside the linear layer that brings picture features to its projected width."""

    def __init__(self, text: CLIPTextModelWithProjection, features: int) -> None:
        super().__init__()
        self.text = text
        self.view_head = nn.Linear(features, text.config.projection_dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, input_ids: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Embed prompts and pictures.

        The causal mask keeps padding out of everything before it, so no attention mask is needed.

        Args:
            input_ids: [b, n] int64, padded on the right.
            features: [b, d] of the pictures.

        Returns:
            Unit text vectors times s, and unit picture vectors, [b, p] each, float32.
        """
        texts = F.normalize(self.text(input_ids=input_ids).text_embeds.float(), dim=-1)
        views = F.normalize(self.view_head(features).float(), dim=-1)
        return texts * self.log_scale.exp().clamp(max=MOST_SCALE), views


def contrastive_loss(logits: Tensor, positive: Tensor) -> Tensor:
    """Return -mean_i log of the probability that row i gives to its positives together.

    Args:
        logits: [b, b].
        positive: [b, b] bool, at least one True in every row.
    """
    return (logits.logsumexp(1) - logits.masked_fill(~positive, -torch.inf).logsumexp(1)).mean()


def gather_rows(local: Tensor) -> Tensor:
    """Return the rows of all processes in order; gradients reach this process's rows only."""
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if world == 1:
        return local
    rows = [torch.empty_like(local) for _ in range(world)]
    torch.distributed.all_gather(rows, local.detach().contiguous())
    rows[torch.distributed.get_rank()] = local
    return torch.cat(rows)


class ViewIndices(Dataset[dict[str, Tensor]]):
    """The numbers of the views; their features are in memory."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"index": torch.tensor(index)}


class TextEncoderTask(Task):
    """One optimizer over the text transformer, the linear layer and the scale."""

    name = "text_encoder"
    ema = ("pair",)

    def __init__(self, config: Config, data: ViewDataset, features: Tensor) -> None:
        self.config, self.data = config, data
        self.builder = PromptBuilder.from_views(data)
        self.tokenizer = train_tokenizer(tokenizer_prompts(self.builder, config.seed), config.vocab_size, config.positions)
        self.features = F.normalize(features, dim=1) * features.shape[1] ** 0.5
        numbers = {caption: i for i, caption in enumerate(dict.fromkeys(data.captions))}
        self.labels = torch.tensor([numbers[data.captions[data.object_of(i)]] for i in range(len(data))])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.modules: dict[str, nn.Module] = {"pair": TextViewModel(self._text_model(), features.shape[1])}
        self.frozen: dict[str, nn.Module] = {}

    def _text_model(self) -> CLIPTextModelWithProjection:
        config = self.config
        ids = self.tokenizer
        return CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(ids),
                hidden_size=config.width,
                intermediate_size=config.mlp_dim,
                projection_dim=config.projection,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                max_position_embeddings=config.positions,
                hidden_act="gelu",
                bos_token_id=ids.bos_token_id,
                eos_token_id=ids.eos_token_id,
                pad_token_id=ids.pad_token_id,
            )
        )

    def dataset(self) -> Dataset[dict[str, Tensor]]:
        """Return the numbers of the views."""
        return ViewIndices(len(self.data))

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return AdamW with decay on matrices, not on tables, norms, biases and the scale."""
        named = list(self.modules["pair"].named_parameters())
        decayed = [p for n, p in named if p.ndim > 1 and "embedding" not in n]
        rest = [p for n, p in named if p.ndim <= 1 or "embedding" in n]
        groups = [{"params": decayed, "weight_decay": self.config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        return {"main": torch.optim.AdamW(groups, lr=self.config.lr, betas=(0.9, 0.98))}

    def prompts(self, views: list[int], draws: list[int]) -> list[str]:
        """Return one prompt per view number, each from its own seed."""
        told = self.config.view_phrases
        return [
            self.builder.build(self.data.object_of(i), self.data.view_of(i) if told else None, seed)
            for i, seed in zip(views, draws, strict=True)
        ]

    def step(self, batch: dict[str, Tensor], ctx: StepContext) -> Iterator[Phase]:
        """Contrast the batch's pictures with prompts drawn for them; all processes' rows are each other's negatives."""
        if ctx.num_parts > 1:
            raise ValueError(f"train.accumulation must be 1 for text_encoder (each part would see fewer negatives), got {ctx.num_parts}.")
        index = batch["index"].cpu()
        seeds = (
            ctx.rand("prompts", len(index), 2).double() @ torch.tensor([2.0**24, 2.0**48], device=ctx.device, dtype=torch.float64)
        ).long()
        texts = self.prompts(index.tolist(), seeds.tolist())
        ids = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"].to(ctx.device)
        local = self.modules["pair"](ids, self.features[index].to(ctx.device))
        t, v = (gather_rows(rows) for rows in local)
        labels = gather_rows(self.labels[index].to(ctx.device))
        positive = labels[:, None] == labels[None, :]
        with torch.autocast(ctx.device.type, enabled=False):  # logits reach 100, where bf16 keeps two digits
            logits = t @ v.T
            loss = (contrastive_loss(logits, positive) + contrastive_loss(logits.T, positive)) / 2
        # Every process has the whole loss but differentiates its own rows; averaging over processes divides by their number.
        loss = loss * ctx.num_processes - loss.detach() * (ctx.num_processes - 1)
        hit = positive.gather(1, logits.argmax(1, keepdim=True)).float().mean()
        yield Phase("main", loss, {"text_finds_view": hit, "scale": t.detach().norm(dim=1).mean()})

    def export(self, modules: dict[str, nn.Module], out: Path) -> None:
        """Write `out/text_encoder` (half precision) and `out/tokenizer` as transformers does."""
        pair = modules["pair"]
        assert isinstance(pair, TextViewModel), "the loop hands back what the task built"
        copy.deepcopy(pair.text).half().save_pretrained(out / "text_encoder")
        self.tokenizer.save_pretrained(out / "tokenizer")


def build(config: Config) -> TextEncoderTask:
    """Build the task of a recipe: open the views and compute or read their features."""
    data = ViewDataset(config.data, config.image_size, cache=config.cache)
    network = FeatureNetwork(config.network, size=config.feature_size)
    return TextEncoderTask(config, data, view_features(network, data, config.cache))
