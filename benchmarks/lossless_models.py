"""The models that the lossless study trains, and `benchmarks.step_time` measures."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["WORDS", "TextCNN", "resnet8", "resnet18", "small_cnn", "transformer"]

WORDS = 1 << 13  # buckets of words of the text model


def small_cnn() -> nn.Module:
    layers = [
        *(nn.Conv2d(1, 16, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 49, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10)),
    ]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def resnet18() -> nn.Module:
    import timm

    model = timm.create_model("resnet18", num_classes=10, in_chans=1)
    model.conv1 = nn.Conv2d(1, 64, 3, padding=1, bias=False)  # the stem for small images
    model.maxpool = nn.Identity()
    return model.to(memory_format=torch.channels_last)


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


def resnet8(width: int = 16) -> nn.Module:
    """Three blocks of two convolutions, each of half the side, on grey images."""
    widths = [width, width, 2 * width, 4 * width]
    layers = [_convolution(1, width, 3), nn.ReLU(), *(_Residual(*two, 2) for two in pairwise(widths))]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10)]
    return nn.Sequential(*layers, *head).to(memory_format=torch.channels_last)


def transformer(width: int, layers: int, words: int = 256) -> nn.Module:
    """Of a sequence of words, int64[b, t], it makes an output for each, float32[b, t, words]; without a mask."""
    layer = nn.TransformerEncoderLayer(width, width // 32, 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True)
    body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    return nn.Sequential(nn.Embedding(words, width), body, nn.LayerNorm(width), nn.Linear(width, words))
