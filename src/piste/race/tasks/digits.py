"""Handwritten digits, scikit-learn's bundled 1,797 images of 8x8: a CNN, an MLP, a ViT, a Mixer, and wrong labels.

Source: the optical digits of Alpaydin & Kaynak 1998, as bundled with scikit-learn; ViT: Dosovitskiy et al. 2021, arXiv
2010.11929; Mixer: Tolstikhin et al. 2021, arXiv 2105.01601.
Known result: once tuned, optimizers tie at 97 to 99 % here (``digits`` is for that verdict; 360 images tell apart half
a percent at best). SGD is behind on attention. Where labels to train with are wrong, what keeps to flat minima wins:
SAM, at twice the gradients (Foret et al. 2021, arXiv 2010.01412, section 3.3).
Cost: 1 to 2 s a run on one core; ``digits_vit`` and ``digits_mixer`` 3 s.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from piste.race.data import Splits
from piste.race.task import Task
from piste.race.tasks.classification import accuracy, cross_entropy

CLASSES = 10
_HELD_OUT = 360  # images in each of the two parts that are not trained on
_WRONG = 0.4  # of the training labels of digits_noise
_PATCH = 2
_WIDTH = 32
_TOKENS = (8 // _PATCH) ** 2


def parts() -> list[tuple[Tensor, Tensor]]:
    """Images and labels to train with, to validate and to report."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16 - 0.5
    y = torch.tensor(labels)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    split = torch.split(order, [len(y) - 2 * _HELD_OUT, _HELD_OUT, _HELD_OUT])
    return [(x[part], y[part]) for part in split]


def _data() -> Splits:
    train, valid, report = parts()
    return Splits(train=train, valid=valid, report=report)


def _noisy_data() -> Splits:
    """The same images; four in ten labels to train with are another digit, the ones to be scored with are right."""
    (images, labels), valid, report = parts()
    draw = torch.Generator().manual_seed(1)
    wrong = torch.rand(len(labels), generator=draw) < _WRONG
    shift = torch.randint(1, CLASSES, (len(labels),), generator=draw)
    noisy = torch.where(wrong, (labels + shift) % CLASSES, labels)
    return Splits(train=(images, noisy), valid=valid, report=report)


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(32 * 16, CLASSES),
    )


class _Mixing(nn.Module):
    """A two-layer perceptron over tokens, then one over channels, each on normalised inputs and added to the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.token_norm, self.channel_norm = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)
        self.tokens = nn.Sequential(nn.Linear(_TOKENS, 2 * _TOKENS), nn.GELU(), nn.Linear(2 * _TOKENS, _TOKENS))
        self.channels = nn.Sequential(nn.Linear(_WIDTH, 2 * _WIDTH), nn.GELU(), nn.Linear(2 * _WIDTH, _WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.token_norm(x).transpose(1, 2)).transpose(1, 2)
        mixed: Tensor = x + self.channels(self.channel_norm(x))
        return mixed


class Mixer(nn.Module):
    """2x2 patches, two mixing layers, the mean of all tokens classified."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, _WIDTH, _PATCH, stride=_PATCH)
        self.layers = nn.Sequential(_Mixing(), _Mixing())
        self.norm = nn.LayerNorm(_WIDTH)
        self.out = nn.Linear(_WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        logits: Tensor = self.out(self.norm(self.layers(tokens)).mean(dim=1))
        return logits


class VisionTransformer(nn.Module):
    """2x2 patches, two encoder layers, the mean of all tokens classified."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, _WIDTH, _PATCH, stride=_PATCH)
        self.positions = nn.Parameter(0.02 * torch.randn(_TOKENS, _WIDTH))
        layer = nn.TransformerEncoderLayer(
            _WIDTH, nhead=4, dim_feedforward=2 * _WIDTH, dropout=0.1, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(_WIDTH)
        self.out = nn.Linear(_WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        logits: Tensor = self.out(self.norm(self.encoder(tokens)).mean(dim=1))
        return logits


digits = Task(
    name="digits",
    model=_cnn,
    data=_data,
    loss=cross_entropy,
    metric=accuracy,
    metric_name="accuracy",
    higher_is_better=True,
    steps=150,
    batch_size=32,
    domain="vision",
    description="a small CNN reads handwritten digits (1,797 images of 8x8)",
)

digits_noise = replace(
    digits,
    name="digits_noise",
    model=_mlp,
    data=_noisy_data,
    steps=1_000,
    description="an MLP that could learn 1,077 digits by heart, four in ten of them labelled wrongly",
)

digits_mlp = replace(
    digits, name="digits_mlp", model=_mlp, description="an MLP reads handwritten digits (1,797 images of 8x8)"
)

digits_mixer = replace(
    digits,
    name="digits_mixer",
    model=Mixer,
    steps=400,
    description="a small MLP-Mixer reads handwritten digits (1,797 images of 8x8)",
)

digits_vit = replace(
    digits,
    name="digits_vit",
    model=VisionTransformer,
    steps=400,
    description="a small ViT reads handwritten digits (1,797 images of 8x8)",
)
