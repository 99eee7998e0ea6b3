"""An image tower and a text tower that meet in one space, trained on pairs alone (CLIP, arXiv 2103.00020)."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ulrl.data.imageset import ImageSet
from ulrl.errors import UserError
from ulrl.models import build_model
from ulrl.models.preact_resnet import PreActResNet18
from ulrl.multimodal.captions import LENGTH, PAD, WORDS, tokenise
from ulrl.seeds import global_stream
from ulrl.training import Objective, head_inputs
from ulrl.untrusted.weights import load_weights

TEXT_WIDTH, TEXT_LAYERS, TEXT_HEADS = 64, 2, 4
HOTTEST = math.log(100)  # CLIP's bound on the logarithm of the temperature's inverse


class TextTower(nn.Module):
    """Words' numbers, int64 [B, LENGTH], to float [B, dim]: a small transformer, averaged over the words.

    Each word sees all others (CLIP's sees those before it). A word that is replaced by PAD is not there.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.words = nn.Embedding(len(WORDS) + 1, TEXT_WIDTH, padding_idx=PAD)
        self.places = nn.Parameter(torch.randn(LENGTH, TEXT_WIDTH) * 0.02)
        layer = nn.TransformerEncoderLayer(
            TEXT_WIDTH, TEXT_HEADS, 4 * TEXT_WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, TEXT_LAYERS, nn.LayerNorm(TEXT_WIDTH), enable_nested_tensor=False)
        self.projection = nn.Linear(TEXT_WIDTH, dim, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        there = tokens != PAD
        out = self.layers(self.words(tokens) + self.places, src_key_padding_mask=~there)
        weight = there.unsqueeze(2) / there.sum(1).clamp_min(1).view(-1, 1, 1)
        return self.projection((out * weight).sum(1))


class DualEncoder(nn.Module):
    """`image`: a PreAct-ResNet18 whose head is the projection into the space; `text`: its tower; `log_scale`: the
    logarithm of the temperature's inverse."""

    def __init__(self, dim: int, width: int, seed: int) -> None:
        super().__init__()
        image = build_model("preactresnet18", dim, 3, width, seed=seed, stream="image tower")
        assert isinstance(image, PreActResNet18)
        self.image = image
        with global_stream(seed, "text tower"):
            self.text = TextTower(dim)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def see(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised images, float32 [B, 3, H, W], to float32 [B, dim] of length 1."""
        return F.normalize(self.image(x).float(), dim=1)

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """Words' numbers, int64 [B, LENGTH], to float32 [B, dim] of length 1."""
        return F.normalize(self.text(tokens).float(), dim=1)

    @torch.no_grad()
    def read_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """float32 [N, dim] of length 1."""
        return self.read(tokenise(texts).to(self.log_scale.device))

    def class_directions(self, prompts: Sequence[Sequence[str]]) -> torch.Tensor:
        """float32 [K, dim] of length 1: the mean of the captions that stand for each class, as CLIP's."""
        return F.normalize(torch.stack([self.read_texts(texts).mean(0) for texts in prompts]), dim=1)

    @torch.no_grad()
    def embed_all(self, data: ImageSet, amp: bool) -> torch.Tensor:
        """The images' embeddings as they are, not yet of length 1, in eval mode: float32 [N, dim]. N at least 1."""
        head = self.image.linear
        return F.linear(head_inputs(self.image, head, data, amp), head.weight, head.bias)


def classifier(encoder: DualEncoder, directions: torch.Tensor) -> PreActResNet18:
    """The zero-shot classifier of K classes, a copy: the image tower, whose head is now `directions` @ projection.

    directions: float32 [K, dim]. Its logits are the dual encoder's times the length of the image's embedding, which is
    one and the same for all classes, so both give each image the same class. It is a network like any other, so
    whatever diagnoses one can diagnose it.
    """
    made = copy.deepcopy(encoder.image)
    projection = made.linear
    made.linear = nn.Linear(projection.in_features, len(directions)).to(projection.weight)
    with torch.no_grad():
        made.linear.weight.copy_(directions @ projection.weight)
        made.linear.bias.copy_(directions @ projection.bias)
    return made


def contrast(images: torch.Tensor, texts: torch.Tensor, log_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """CLIP's loss (scalar) of a batch of pairs, and for which images the own caption is the nearest (bool [B]).

    images, texts: float32 [B, dim] of length 1. As in CLIP, all other captions of the batch count as wrong, though some
    may be the very same.
    """
    with torch.autocast(images.device.type, enabled=False):
        logits = log_scale.clamp(max=HOTTEST).exp() * images @ texts.T
        own = torch.arange(len(logits), device=logits.device)
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    return loss, logits.detach().argmax(1) == own


def contrastive(tokens: torch.Tensor) -> Objective:
    """The objective of training on pairs; a sample's label is the place of its caption in `tokens` [N, LENGTH]."""

    def objective(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert isinstance(model, DualEncoder)
        return contrast(model.see(x), model.read(tokens[y]), model.log_scale)

    return objective


def load_encoder(file: Path) -> DualEncoder:
    """A dual encoder from its safetensors file; its sizes are read off the weights.

    Raises:
        UserError: it cannot be read, or holds other weights than those of a dual encoder for these captions.
    """
    weights = load_weights(file)
    first, head = weights.get("image.conv1.weight"), weights.get("image.linear.weight")
    if first is None or head is None or first.ndim != 4 or head.ndim != 2:
        raise UserError(f"{file} holds no dual encoder: it lacks image.conv1.weight or image.linear.weight")
    with torch.device("meta"):
        encoder = DualEncoder(head.shape[0], first.shape[0], 0)
    expected = {name: tuple(weight.shape) for name, weight in encoder.state_dict().items()}
    if expected != {name: tuple(weight.shape) for name, weight in weights.items()}:
        raise UserError(f"{file} holds no dual encoder for the captions of fashion_scenes: its weights do not fit")
    encoder.load_state_dict(weights, assign=True)
    return encoder
