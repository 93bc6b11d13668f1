"""Networks drawn at random: dimensions, geometries, norms, every spelling of an activation, views and slices."""

import random

import torch
import torch.nn.functional as F
from nets import SMOOTH, SPELLINGS, seeded
from torch import nn

SIZES = {1: 24, 2: 9, 3: 6}
# Pairs: as users spell it, and the plain function that the oracle knows; without randomness or parameters.
ACTIVATIONS = [pair for name, pair in SPELLINGS.items() if name not in ("F.rrelu in training", "nn.PReLU")]
ACTIVATIONS += [(SMOOTH[name], SMOOTH[name.removesuffix(" inplace").removesuffix("_")]) for name in SMOOTH]


class RandomNet(nn.Module):
    """A few stages of convolution, norm, activation, pooling; images (N, 3, *SIZES), four classes."""

    def __init__(self, seed, reference=False):
        super().__init__()
        self.chance = random.Random(seed)
        torch.manual_seed(seed)
        self.dims = self.chance.choice([1, 2, 2, 2, 3])
        self.stages = nn.ModuleList()
        channels, size = 3, SIZES[self.dims]
        for _ in range(self.chance.randint(1, 4)):
            stage = Stage(self.chance, self.dims, channels, size, reference)
            self.stages.append(stage)
            channels, size = stage.channels, stage.size
        self.head = nn.Linear(channels, 4)
        self.double()
        for module in self.modules():
            for parameter in module.parameters(recurse=False):
                if parameter.dim() == 1 and not isinstance(module, nn.PReLU):
                    nn.init.uniform_(parameter, 0.5, 1.5)
        if self.chance.random() < 0.3:
            for parameter in list(self.parameters())[:-2]:  # not of the head
                parameter.requires_grad_(self.chance.random() < 0.6)
        self.train(self.chance.random() < 0.7)

    def images(self):
        generator = seeded(self.chance.randint(0, 2**31))
        shape = (self.chance.randint(2, 4), 3, *[SIZES[self.dims]] * self.dims)
        x = torch.randn(shape, dtype=torch.float64, generator=generator)
        return x, torch.randint(4, shape[:1], generator=generator)

    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        return self.head(x.flatten(2).mean(2))


class Stage(nn.Module):
    """One convolution and what follows it."""

    def __init__(self, chance, dims, channels, size, reference):
        super().__init__()
        self.reference = reference
        self.channels = chance.choice([4, 6, 8])
        self.conv, self.size = convolution(chance, dims, channels, self.channels, size)
        self.norm = norm(chance, dims, self.channels, self.size)
        self.activation = chance.choice(ACTIVATIONS)[reference]
        forms = ["plain", "plain", "residual", "halves", "slice in place", "transposed", "twice", "attention"]
        self.form = chance.choice(forms)
        self.pool, self.size = pooling(chance, dims, self.size)

    def forward(self, x):
        h = self.norm(self.conv(x))
        rectify = self.activation
        if self.form == "residual":
            h = rectify(h * 1) + 0.5 * h
        elif self.form == "halves":
            first, second = h.chunk(2, 1)
            h = torch.cat([rectify(first * 1), 0.3 * second], 1)
        elif self.form == "slice in place":
            if self.reference:
                rectified = torch.arange(h.shape[1]) % 2 == 0
                h = torch.where(rectified.view(-1, *[1] * (h.dim() - 2)), F.relu(h), h)
            else:
                h = h * 1
                h[:, ::2].relu_()
            h = rectify(h * 1)
        elif self.form == "transposed":
            h = rectify(h.transpose(1, 2) * 1).transpose(1, 2)
        elif self.form == "twice":
            h = F.leaky_relu(rectify(h * 1) - 0.2, 0.1)
        elif self.form == "attention":
            tokens = rectify(h * 1).flatten(2).mT
            h = h + self.attend(tokens).mT.view_as(h)
        else:
            h = rectify(h)
        return self.pool(h)

    def attend(self, tokens):
        if self.reference:
            return (tokens @ tokens.mT / tokens.shape[-1] ** 0.5).softmax(-1) @ tokens
        return F.scaled_dot_product_attention(tokens, tokens, tokens)


def convolution(chance, dims, inputs, outputs, size):
    """A layer, and the side of its output."""
    kernel, stride, dilation = chance.choice([1, 2, 3, 3]), chance.choice([1, 1, 2]), chance.choice([1, 1, 2])
    padding, bias = chance.choice([0, 1, 2]), chance.random() < 0.5
    reach = dilation * (kernel - 1)
    groups = chance.choice([each for each in (1, 2, 4) if inputs % each == 0 and outputs % each == 0])
    if chance.random() < 0.2 and size <= SIZES[dims]:
        layer = getattr(nn, f"ConvTranspose{dims}d")
        after = (size - 1) * stride - 2 * padding + reach + 1
    else:
        layer = getattr(nn, f"Conv{dims}d")
        after = (size + 2 * padding - reach - 1) // stride + 1
    if not 3 <= after <= 2 * SIZES[dims]:
        return getattr(nn, f"Conv{dims}d")(inputs, outputs, 3, padding=1, groups=groups, bias=bias), size
    settings = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "bias": bias}
    return layer(inputs, outputs, kernel, **settings), after


def norm(chance, dims, channels, size):
    affine, tracked = chance.random() < 0.7, chance.random() < 0.7
    return chance.choice(
        [
            nn.Identity(),
            getattr(nn, f"BatchNorm{dims}d")(channels, affine=affine, track_running_stats=tracked),
            getattr(nn, f"BatchNorm{dims}d")(channels, eps=0.01),
            getattr(nn, f"InstanceNorm{dims}d")(channels, affine=affine, track_running_stats=tracked),
            nn.GroupNorm(chance.choice([1, 2]), channels, affine=affine),
            nn.LayerNorm([channels, *[size] * dims], elementwise_affine=affine),
        ]
    )


def pooling(chance, dims, size):
    """A layer, and the side of its output."""
    name = chance.choice(["none", "none", "max", "average", "adaptive"])
    if size < 4 or name == "none":
        return nn.Identity(), size
    if name == "adaptive":
        return getattr(nn, f"AdaptiveAvgPool{dims}d")(3), 3
    layer = getattr(nn, f"{'Max' if name == 'max' else 'Avg'}Pool{dims}d")
    stride = chance.choice([1, 2])
    return layer(2, stride), (size - 2) // stride + 1
