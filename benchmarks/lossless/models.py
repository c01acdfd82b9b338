"""The models that the lossless study trains, and `benchmarks.step_time` measures."""

from collections.abc import Iterable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["GPT", "WORDS", "TextCNN", "ViT", "resnet8", "resnet18", "small_cnn", "transformer"]

WORDS = 1 << 13  # buckets of words of the text model


def small_cnn() -> nn.Module:
    layers = [
        *(nn.Conv2d(1, 16, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 49, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10)),
    ]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


class _Residual(nn.Module):
    """Two convolutions and a way around them (He et al., CVPR 2016)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = _convolution(before, after, 3, stride)
        self.second = _convolution(after, after, 3)
        self.around = nn.Identity() if before == after and stride == 1 else _convolution(before, after, 1, stride)

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(images))) + self.around(images))


def _convolution(before: int, after: int, side: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, side, stride, side // 2, bias=False), nn.BatchNorm2d(after))


def _resnet(widths: list[int], strides: Iterable[int], stem: int = 1) -> nn.Module:
    """A convolution of ``stem`` as its stride, then a block from each of ``widths`` to the next, on grey images."""
    blocks = [_Residual(*two, stride) for two, stride in zip(pairwise(widths), strides, strict=True)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10)]
    layers = [_convolution(1, widths[0], 3, stem), nn.ReLU(), *blocks, *head]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def resnet8(width: int = 16) -> nn.Module:
    """Three blocks of two convolutions, each of half the side."""
    return _resnet([width, width, 2 * width, 4 * width], (2, 2, 2))


def resnet18(width: int, stem: int = 1) -> nn.Module:
    """Eight blocks of two convolutions, as of ResNet-18, with the stem for small images; ``stem``: its stride."""
    return _resnet([width, *(many * width for many in (1, 1, 2, 2, 4, 4, 8, 8))], (1, 1, 2, 1, 2, 1, 2, 1), stem)


class TextCNN(nn.Module):
    """Words to vectors, one convolution over three of them, the largest of each channel (Kim, EMNLP 2014)."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 32, padding_idx=0)
        self.phrases = nn.Conv1d(32, 48, 3, padding=1)
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(48, 2))

    def forward(self, words: Tensor) -> Tensor:
        found = torch.relu(self.phrases(self.words(words).transpose(1, 2)))
        return self.head(found.amax(dim=2))


def _encoder(width: int, layers: int) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(width, width // 32, 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def transformer(width: int, layers: int, words: int = 256) -> nn.Module:
    """Of a sequence of words, int64[b, t], it makes an output for each, float32[b, t, words]; without a mask."""
    body = _encoder(width, layers)
    return nn.Sequential(nn.Embedding(words, width), body, nn.LayerNorm(width), nn.Linear(width, words))


class ViT(nn.Module):
    """Patches of a grey image of 28x28 to vectors, a transformer, the mean (Dosovitskiy et al., ICLR 2021)."""

    def __init__(self, width: int, layers: int, patch: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, patch, patch)
        self.places = nn.Parameter(0.02 * torch.randn(1, (28 // patch) ** 2, width))
        self.body = _encoder(width, layers)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10))

    def forward(self, images: Tensor) -> Tensor:
        found = self.body(self.patches(images).flatten(2).transpose(1, 2) + self.places)
        return self.head(found.mean(dim=1))


class GPT(nn.Module):
    """The next byte of each byte of a text, from those before it: int64[b, t] to float32[b, t, 256]."""

    def __init__(self, width: int, layers: int, length: int) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, width)
        nn.init.normal_(self.bytes.weight, std=0.02)
        self.places = nn.Parameter(0.02 * torch.randn(1, length, width))
        self.body = _encoder(width, layers)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 256, bias=False))
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length), persistent=False)

    def forward(self, text: Tensor) -> Tensor:
        length = text.shape[1]
        found = self.bytes(text) + self.places[:, :length]
        return self.head(self.body(found, mask=self.mask[:length, :length], is_causal=True))
