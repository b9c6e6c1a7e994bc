"""DualU-Net: one encoder and two U-Net decoders that find, outline and classify nuclei.

Anglada-Rotger et al., "Two heads are enough: DualU-Net, a fast and efficient architecture for
nuclei instance segmentation", MIDL 2025. Needs torch alone; copy this file anywhere:

    model = DualUNet(num_classes=5)                      # 5 classes of nuclei
    logits, density = model(torch.rand(2, 3, 256, 256))  # RGB in [0, 1]
    logits.shape, density.shape                          # (2, 6, 256, 256), (2, 1, 256, 256)

`num_classes` K excludes the background. `logits` has K + 1 channels, and class 0 is background.
"""

import copy
import math
import os
import pickle
import re

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # published config
IMAGENET_STD = (0.229, 0.224, 0.225)  # published config
UNKNOWN_CLASS = 255  # in a type_map: a nucleus whose class the data set does not tell
DENSITY_WEIGHT = 20.0  # ours: with 1 (paper) the density is undertrained, and nuclei are missed


# ---------------------------------------------------------------- encoders
#
# An encoder is any module with `channels` and `strides` (five numbers each, finest first) that
# returns five features. Its `mean` and `std`, if it has them, normalise RGB in [0, 1].


class ResNetBlock(nn.Module):
    """Residual block, basic (3×3, 3×3) or bottleneck (1×1, 3×3, 1×1), with torchvision's names."""

    def __init__(self, in_channels, channels, *, stride, bottleneck, groups, group_width):
        super().__init__()
        width = channels * group_width * groups // 64
        out_channels = channels * (4 if bottleneck else 1)
        if bottleneck:
            self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
            self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False)
            self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(out_channels)
        else:
            self.conv1 = nn.Conv2d(in_channels, width, 3, stride, 1, bias=False)
            self.conv2 = nn.Conv2d(width, out_channels, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.bn2 = nn.BatchNorm2d(self.conv2.out_channels)
        self.bottleneck = bottleneck
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels))

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        if self.bottleneck:
            x = self.bn3(self.conv3(F.relu(x)))
        return F.relu(x + shortcut)


class ResNet(nn.Module):
    """ResNet and ResNeXt without the classifier. Source: He et al. 2016, Xie et al. 2017."""

    strides = (2, 4, 8, 16, 32)

    def __init__(self, depths, *, bottleneck, groups=1, group_width=64):
        super().__init__()
        expansion = 4 if bottleneck else 1
        self.channels = (64, 64 * expansion, 128 * expansion, 256 * expansion, 512 * expansion)
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        for i, depth in enumerate(depths):
            blocks = []
            for b in range(depth):
                first = b == 0
                blocks.append(ResNetBlock(
                    self.channels[i] if first else self.channels[i + 1], 64 * 2**i,
                    stride=2 if first and i > 0 else 1,
                    bottleneck=bottleneck, groups=groups, group_width=group_width))
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))

    def forward(self, x):
        features = [F.relu(self.bn1(self.conv1(x)))]  # (N, 64, H/2, W/2)
        x = F.max_pool2d(features[0], 3, 2, 1)
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            features.append(x)  # H/4, H/8, H/16, H/32
        return features


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (N, C, H, W)."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtMLP(nn.Module):
    """Two linear layers over the last axis, GELU between; a module so that names match timm's."""

    def __init__(self, channels):
        super().__init__()
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class ConvNeXtBlock(nn.Module):
    """Depthwise 7×7, LayerNorm, MLP, layer scale. Parameter names: timm's.

    After the depthwise convolution it works in (N, H, W, C), where LayerNorm and Linear need no
    transposition.
    """

    def __init__(self, channels):
        super().__init__()
        self.conv_dw = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = ConvNeXtMLP(channels)
        self.gamma = nn.Parameter(torch.full((channels,), 1e-6))  # paper

    def forward(self, x):
        y = self.conv_dw(x).permute(0, 2, 3, 1)  # (N, H, W, C)
        y = self.gamma * self.mlp(self.norm(y))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXtStage(nn.Module):
    """LayerNorm and a strided 2×2 convolution (not in the first stage), then blocks."""

    def __init__(self, in_channels, channels, depth):
        super().__init__()
        self.downsample = nn.Identity()
        if in_channels != channels:
            self.downsample = nn.Sequential(
                ChannelNorm(in_channels, eps=1e-6), nn.Conv2d(in_channels, channels, 2, 2))
        self.blocks = nn.Sequential(*(ConvNeXtBlock(channels) for _ in range(depth)))

    def forward(self, x):
        return self.blocks(self.downsample(x))


class ConvNeXt(nn.Module):
    """ConvNeXt without the classifier. Source: Liu et al. 2022."""

    strides = (4, 4, 8, 16, 32)

    def __init__(self, depths, dims):
        super().__init__()
        self.channels = (dims[0], *dims)
        self.stem = nn.Sequential(nn.Conv2d(3, dims[0], 4, 4), ChannelNorm(dims[0], eps=1e-6))
        self.stages = nn.Sequential(*map(ConvNeXtStage, self.channels, dims, depths))

    def forward(self, x):
        features = [self.stem(x)]  # (N, C, H/4, W/4)
        for stage in self.stages:
            features.append(stage(features[-1]))  # H/4, H/8, H/16, H/32
        return features


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's "same" padding: an odd pixel goes to the bottom and right."""

    def forward(self, x):
        total = self.kernel_size[0] - self.stride[0]
        before, after = total // 2, total - total // 2
        return super().forward(F.pad(x, (before, after, before, after)))


def conv_norm(in_channels, out_channels, kernel, stride=1, groups=1):
    """Convolution and BatchNorm with EfficientNet's settings."""
    if stride == 1:
        conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, groups=groups,
                         bias=False)
    else:
        conv = SameConv2d(in_channels, out_channels, kernel, stride, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels, eps=1e-3, momentum=0.05))


class InvertedResidual(nn.Module):
    """1×1 convolution to more channels, depthwise convolution, 1×1 convolution back, shortcut."""

    def __init__(self, in_channels, out_channels, *, kernel, stride, expansion):
        super().__init__()
        width = in_channels * expansion
        self.expand = conv_norm(in_channels, width, 1) if expansion > 1 else None
        self.depthwise = conv_norm(width, width, kernel, stride, groups=width)
        self.project = conv_norm(width, out_channels, 1)
        self.shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x):
        y = x if self.expand is None else F.relu6(self.expand(x), inplace=True)
        y = F.relu6(self.depthwise(y), inplace=True)
        y = self.project(y)
        return x + y if self.shortcut else y


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite without the classifier: no squeeze-and-excitation, ReLU6.

    Source: Tan, Le 2019 (EfficientNet); the Lite variants of its authors' repository.
    """

    strides = (2, 4, 8, 16, 32)
    mean = (127 / 255,) * 3  # its ImageNet weights expect (255 · x - 127) / 128
    std = (128 / 255,) * 3

    def __init__(self, depths, widths):
        super().__init__()
        self.channels = tuple(widths[stage] for stage in (0, 1, 2, 4, 6))
        self.stem = conv_norm(3, 32, 3, stride=2)
        self.stages = nn.ModuleList()
        in_channels = 32
        kernels, strides, expansions = (3, 3, 5, 3, 5, 5, 3), (1, 2, 2, 2, 1, 2, 1), (1,) + (6,) * 6
        for depth, width, kernel, stride, expansion in zip(
                depths, widths, kernels, strides, expansions):
            blocks = []
            for b in range(depth):
                blocks.append(InvertedResidual(in_channels, width, kernel=kernel,
                                               stride=stride if b == 0 else 1, expansion=expansion))
                in_channels = width
            self.stages.append(nn.Sequential(*blocks))

    def forward(self, x):
        x = F.relu6(self.stem(x), inplace=True)
        outputs = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return [outputs[stage] for stage in (0, 1, 2, 4, 6)]  # H/2, H/4, H/8, H/16, H/32


LITE_WIDTHS = (16, 24, 40, 80, 112, 192, 320)
ENCODERS = {
    "resnet18": lambda: ResNet((2, 2, 2, 2), bottleneck=False),
    "resnet34": lambda: ResNet((3, 4, 6, 3), bottleneck=False),
    "resnet50": lambda: ResNet((3, 4, 6, 3), bottleneck=True),
    "resnext50_32x4d": lambda: ResNet((3, 4, 6, 3), bottleneck=True, groups=32, group_width=4),
    "convnext_tiny": lambda: ConvNeXt((3, 3, 9, 3), (96, 192, 384, 768)),
    "convnext_base": lambda: ConvNeXt((3, 3, 27, 3), (128, 256, 512, 1024)),
    "efficientnet_lite0": lambda: EfficientNetLite((1, 2, 2, 3, 3, 4, 1), LITE_WIDTHS),
    "efficientnet_lite1": lambda: EfficientNetLite((1, 3, 3, 4, 4, 5, 1), LITE_WIDTHS),
    "efficientnet_lite2": lambda: EfficientNetLite(
        (1, 3, 3, 4, 4, 5, 1), (16, 24, 48, 88, 120, 208, 352)),
}


# ---------------------------------------------------------------- decoder and network


def conv_norm_relu(in_channels, out_channels):
    """3×3 convolution, BatchNorm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True))


class DecoderBlock(nn.Module):
    """Nearest upsampling, concatenation with the skip, then two 3×3 convolutions."""

    def __init__(self, in_channels, skip_channels, out_channels, scale):
        super().__init__()
        self.scale = scale
        self.conv1 = conv_norm_relu(in_channels + skip_channels, out_channels)
        self.conv2 = conv_norm_relu(out_channels, out_channels)

    def forward(self, x, skip=None):
        if self.scale > 1:
            x = F.interpolate(x, scale_factor=self.scale, mode="nearest")
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        return self.conv2(self.conv1(x))


class Decoder(nn.Module):
    """U-Net decoder from features, finest first, to one map at full resolution."""

    def __init__(self, encoder_channels, encoder_strides, channels, image_skip=0):
        super().__init__()
        inputs = (encoder_channels[-1], *channels)
        skips = (*reversed(encoder_channels[:-1]), image_skip)
        strides = (*reversed(encoder_strides), 1)
        self.blocks = nn.ModuleList()
        for i in range(5):
            scale = strides[i] // strides[i + 1]
            self.blocks.append(DecoderBlock(inputs[i], skips[i], channels[i], scale))

    def forward(self, features):
        x = features[-1]
        skips = [*reversed(features[:-1]), None]  # without an image skip the last block has none
        for block, skip in zip(self.blocks, skips):
            x = block(x, skip)
        return x


class DualUNet(nn.Module):
    """One encoder with two decoders: one classifies the pixels, the other locates the nuclei.

    encoder: a name in ENCODERS, or a module of your own (see "encoders" above).
    decoder_channels: five widths, deepest first. image_skip: channels that a 3×3 convolution
    makes from the image; both decoders take them as the skip of their last block. 0 (published)
    means no such skip. `config` holds the arguments and the metadata of the file (see METADATA).
    """

    def __init__(self, *, num_classes, encoder="resnext50_32x4d",
                 decoder_channels=(256, 128, 64, 32, 16), image_skip=0):
        super().__init__()
        if isinstance(encoder, str) and encoder not in ENCODERS:
            raise ValueError(f"encoder is {encoder!r}; choose one of {', '.join(ENCODERS)}, "
                             "or pass a module with channels and strides")
        if len(decoder_channels) != 5:
            raise ValueError(f"decoder_channels has {len(decoder_channels)} entries; "
                             "give 5, deepest first")
        name = encoder if isinstance(encoder, str) else type(encoder).__name__
        self.config = {"num_classes": num_classes, "encoder": name,
                       "decoder_channels": tuple(decoder_channels), "image_skip": image_skip}

        # one encoder; image_skip adds a feature at full resolution
        self.encoder = ENCODERS[encoder]() if isinstance(encoder, str) else encoder
        if not len(self.encoder.channels) == len(self.encoder.strides) == 5:
            raise ValueError(f"the encoder's channels are {self.encoder.channels}, its strides "
                             f"{self.encoder.strides}; expected five of each, finest first")
        self.image_skip = conv_norm_relu(3, image_skip) if image_skip else None

        # two decoders with one head each
        layout = (self.encoder.channels, self.encoder.strides, decoder_channels, image_skip)
        self.segmentation_decoder = Decoder(*layout)
        self.density_decoder = Decoder(*layout)
        self.segmentation_head = nn.Conv2d(decoder_channels[-1], num_classes + 1, 3, padding=1)
        self.density_head = nn.Conv2d(decoder_channels[-1], 1, 3, padding=1)

        # normalisation is part of the model, so that preprocessing cannot drift
        mean = torch.tensor(getattr(self.encoder, "mean", IMAGENET_MEAN)).view(3, 1, 1)
        std = torch.tensor(getattr(self.encoder, "std", IMAGENET_STD)).view(3, 1, 1)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.initialise(own_encoder=not isinstance(encoder, str))

    def initialise(self, own_encoder):
        """He initialisation; an encoder that the caller passed keeps its weights."""
        for part_name, part in self.named_children():
            if part_name == "encoder" and own_encoder:
                continue
            for module in part.modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
        for head in (self.segmentation_head, self.density_head):
            nn.init.normal_(head.weight, std=0.01)  # ours: first maps are nearly uniform

    def forward(self, images):
        """Computes the two raw maps of RGB images.

        images: (N, 3, H, W) float in [0, 1], of any H and W: they are padded to multiples of 32.
        Returns logits (N, K + 1, H, W) and density (N, 1, H, W), both float32, even under autocast.
        """
        if not images.is_floating_point():
            raise ValueError(f"images are {images.dtype}; expected float in [0, 1]: divide by 255")
        height, width = images.shape[-2:]
        x = (images - self.mean) / self.std
        if height % 32 or width % 32:  # unlike reflection, replication works at any size
            x = F.pad(x, (0, -width % 32, 0, -height % 32), mode="replicate")
        x = x.to(next(self.encoder.parameters()).dtype)

        features = self.encoder(x)  # five, at strides 2 to 32
        if self.image_skip is not None:
            features = [self.image_skip(x), *features]  # (N, image_skip, H, W)
        what = self.segmentation_decoder(features)  # (N, C, H, W)
        where = self.density_decoder(features)  # (N, C, H, W)

        # heads in float32: in bfloat16 1 to 2 % of the nuclei would change
        with torch.autocast(x.device.type, enabled=False):
            logits = self.segmentation_head(what.float())
            density = self.density_head(where.float())
        return logits[..., :height, :width], density[..., :height, :width]

    def fuse(self, dtype=None):
        """Returns a frozen copy for inference, see "inference form" below.

        dtype: None, or a half precision for all parts but the heads.
        """
        return fuse(self, dtype)


# ---------------------------------------------------------------- loss


def dual_loss(logits, density, type_map, density_target, *, class_weights=None,
              ce_weight=1.0, dice_weight=1.0, density_weight=DENSITY_WEIGHT):
    """Weighted cross-entropy + soft Dice over classes + mean squared error of the density.

    logits (N, K+1, H, W), density (N, 1, H, W), type_map (N, H, W) integer in 0..K or
    UNKNOWN_CLASS, density_target (N, 1, H, W), class_weights (K+1,) or None. Returns a dict of
    scalars: "ce", "dice", "mse" and their weighted sum "loss".

    The cross-entropy is the plain mean of weight · loss over the pixels (published); torch would
    divide by the sum of the weights. A pixel of unknown class may be any nucleus: its loss is −log
    of the sum of all nucleus probabilities, its weight is the median of the nucleus weights, and
    the Dice of the nucleus classes leaves it out.
    """
    # cross-entropy of each pixel
    log_p = F.log_softmax(logits.float(), dim=1)  # (N, K+1, H, W)
    unknown = type_map == UNKNOWN_CLASS  # (N, H, W)
    target = type_map.long().masked_fill(unknown, 0)
    nll = -log_p.gather(1, target[:, None])[:, 0]  # (N, H, W)
    nll = torch.where(unknown, -log_p[:, 1:].logsumexp(dim=1), nll)
    if class_weights is not None:
        nll = nll * torch.where(unknown, class_weights[1:].median(), class_weights[target])

    # soft Dice of each class; the background is known everywhere
    known = ~unknown[:, None]  # (N, 1, H, W)
    truth = F.one_hot(target, logits.shape[1]).permute(0, 3, 1, 2) * known  # (N, K+1, H, W)
    p = log_p.exp()
    p = torch.cat([p[:, :1], p[:, 1:] * known], dim=1)
    overlap = (p * truth).sum(dim=(0, 2, 3))  # (K+1,)
    total = (p + truth).sum(dim=(0, 2, 3))
    dice = 1 - ((2 * overlap + 1) / (total + 1)).mean()  # + 1: published eps

    terms = {"ce": nll.mean(), "dice": dice, "mse": F.mse_loss(density.float(), density_target)}
    terms["loss"] = (ce_weight * terms["ce"] + dice_weight * terms["dice"]
                     + density_weight * terms["mse"])
    return terms


# ---------------------------------------------------------------- our checkpoint files

PUBLISHED_CLASSES = {  # name -> colour in overlays; the data sets' authors chose them
    "CoNSeP": {"miscellaneous": (0, 255, 255), "inflammatory": (255, 0, 0),
               "epithelial": (0, 0, 255), "spindle-shaped": (0, 255, 0)},
    "PanNuke": {"neoplastic": (255, 0, 0), "inflammatory": (0, 255, 0), "connective": (0, 0, 255),
                "dead": (255, 255, 0), "epithelial": (255, 165, 0)},
}
METADATA = {  # what a file states besides the architecture, and the defaults
    "class_names": None,  # K names
    "colors": None,  # K RGB triples
    "mpp": None,  # µm per pixel of the training images
    "licence": None,  # of the weights
    "sigma": 5.0,  # of the density's peaks, in pixels
    "reconstruct": {},  # options of postprocess.reconstruct that fit this model
    "tile": None, "halo": None,  # of inference; windows far larger than the crops harm
}


def class_colors(class_names):
    """K RGB colours: published ones if all names are of one published set, else spaced hues."""
    for published in PUBLISHED_CLASSES.values():
        if published.keys() >= set(class_names):
            return [published[name] for name in class_names]
    colors = []
    for k in range(len(class_names)):
        hue = math.tau * (k + 0.35) / len(class_names)  # a single class is green
        colors.append(tuple(round(127.5 + 127.5 * math.cos(hue - c * math.tau / 3))
                            for c in range(3)))
    return colors


def save_checkpoint(path, model, *, half=False, **extra):
    """Writes a self-describing file for `load_model`; a failed call leaves an old file intact.

    half: stores weights of two or more axes in float16, for a small file; norms and biases stay
    float32. extra: plain values and state dicts to store too (optimizer, epoch, ...).
    """
    state = model.state_dict()
    if half:
        state = {name: v.half() if v.ndim > 1 else v for name, v in state.items()}
    config = {name: v for name, v in model.config.items() if name not in METADATA}
    metadata = {name: model.config.get(name, default) for name, default in METADATA.items()}
    temporary = f"{path}.tmp"
    with open(temporary, "wb") as file:
        torch.save({"model": state, "model_config": config, **metadata, **extra}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_checkpoint(path):
    """Reads the plain dict in a torch file, on the CPU; code in it is never run.

    Raises: FileNotFoundError; ValueError when it is no checkpoint, is cut short or holds code.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such checkpoint; "
                                "give the path of a .pt or .pth file") from None
    except pickle.UnpicklingError as error:
        if "Weights only load failed" not in str(error) or "Unsupported global" not in str(error):
            raise ValueError(f"{path}: not a torch checkpoint; "
                             "expected a .pt or .pth file") from None
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise ValueError(f"{path}: holds code ({name[1] if name else 'unknown'}), "
                         "which is never run; save its state_dict alone and load that") from None
    except Exception as error:  # torch raises a dozen kinds on damaged files
        raise ValueError(f"{path}: damaged or not a torch checkpoint ({type(error).__name__}); "
                         "download or copy it again") from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path}: expected a dict of tensors, got {type(checkpoint).__name__}")
    return checkpoint


def some(names):
    """The first three names as text, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def check_keys(path, expected, got):
    """Raises ValueError that names tensors which are missing, extra, misshapen or not finite."""
    problems = []
    if missing := expected.keys() - got.keys():
        problems.append(f"missing {some(missing)}")
    if extra := got.keys() - expected.keys():
        problems.append(f"left over {some(extra)}")
    wrong = [k for k in expected.keys() & got.keys() if expected[k].shape != got[k].shape]
    for k in sorted(wrong)[:3]:
        problems.append(f"{k} is {tuple(got[k].shape)}, expected {tuple(expected[k].shape)}")
    if problems:
        raise ValueError(f"{path}: does not fit the architecture: {'; '.join(problems)}")
    for name, value in got.items():
        if value.layout != torch.strided:
            raise ValueError(f"{path}: {name} is sparse; use another checkpoint")
        if not value.isfinite().all():
            raise ValueError(f"{path}: {name} holds NaN or infinity; use another checkpoint")


def check_metadata(path, metadata):
    """Raises ValueError for metadata of another type than `save_checkpoint` writes."""
    kinds = {"class_names": (list, tuple), "colors": (list, tuple), "mpp": (int, float),
             "licence": str, "sigma": (int, float), "reconstruct": dict, "tile": int, "halo": int}
    for name, kind in kinds.items():
        value = metadata[name]
        good = value is None or isinstance(value, kind)
        if name == "class_names" and good:
            good = all(isinstance(class_name, str) for class_name in value or [])
        if not good:
            raise ValueError(f"{path}: its {name} is {value!r}; convert it again, or save it with "
                             "save_checkpoint")


def model_from(path, checkpoint, device="cpu", encoder=None):
    """Builds the model from a dict that `save_checkpoint` stored, in float32 and eval mode."""
    config, state = dict(checkpoint["model_config"]), checkpoint["model"]
    if encoder is not None:
        config["encoder"] = encoder
    try:
        model = DualUNet(**config)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: its model_config fits no DualU-Net ({error})") from None
    check_keys(path, model.state_dict(), state)
    model.load_state_dict(state)

    metadata = METADATA | {k: checkpoint[k] for k in METADATA if k in checkpoint}
    check_metadata(path, metadata)
    num_classes = model.config["num_classes"]
    names = metadata["class_names"] or [f"class {k}" for k in range(1, num_classes + 1)]
    if len(names) != num_classes:
        raise ValueError(f"{path}: names {names} for {num_classes} classes; expected one each")
    metadata["class_names"] = list(names)
    metadata["colors"] = metadata["colors"] or class_colors(names)
    model.config |= metadata
    return model.to(device).eval()


def load_model(path, device="cpu", encoder=None):
    """Loads the model from a file that `save_checkpoint` wrote, in float32 and eval mode.

    `model.config` holds what the file states, see METADATA. encoder: your module, if the model was
    built with one. Raises: FileNotFoundError, ValueError.
    """
    checkpoint = read_checkpoint(path)
    for part in ("model", "model_config"):
        if not isinstance(checkpoint.get(part), dict):
            raise ValueError(f"{path}: not a file of ours; "
                             f"convert it: python convert.py {path} ours.pt")
    return model_from(path, checkpoint, device, encoder)


# ---------------------------------------------------------------- inference form
#
# You may skip this section: it only computes the same maps faster.


def fuse(model, dtype=None):
    """A frozen copy of a DualUNet that takes 0.6 of the time; float32 maps agree to 1e-5.

    dtype: None, or a half precision for all parts but the heads. Autocast works too, but it casts
    the weights again at every call. Rejected after measuring: both decoders as one network with
    grouped convolutions. It was no faster, and slow in bfloat16.
    """
    fused = copy.deepcopy(model).eval()
    fold_batchnorm(fused)
    inputs = (model.encoder.channels[-1], *model.config["decoder_channels"])
    for decoder in (fused.segmentation_decoder, fused.density_decoder):
        decoder.blocks = nn.ModuleList(map(FusedBlock, decoder.blocks, inputs))
    for name, part in fused.named_children():
        if not name.endswith("_head"):
            part.to(dtype=dtype)
    return fused.requires_grad_(False).to(memory_format=torch.channels_last)


def fold_batchnorm(module):
    """Folds every BatchNorm into the convolution before it.

    The pairs are conv1 and bn1, conv2 and bn2, ..., or neighbours in a Sequential.
    """
    for name, child in list(module.named_children()):
        fold_batchnorm(child)
        if not isinstance(child, nn.BatchNorm2d):
            continue
        if isinstance(module, nn.Sequential):
            conv_name = str(int(name) - 1)
        else:
            conv_name = name.replace("bn", "conv")
        conv = getattr(module, conv_name, None)
        if isinstance(conv, nn.Conv2d):
            setattr(module, conv_name, fuse_conv_bn_eval(conv, child))
            setattr(module, name, nn.Identity())


class FusedBlock(nn.Module):
    """A DecoderBlock for inference, with BatchNorm folded, without upsampling or concatenation.

    Nearest upsampling by s and then a 3×3 convolution equal one transposed convolution of stride s.
    Its kernel, of side s + 2, is the sum of the flipped 3×3 kernel at s² offsets. With s = 2 an
    output pixel takes 4 multiplications instead of 9.
    """

    def __init__(self, block, in_channels):
        super().__init__()
        conv, s = block.conv1[0], block.scale
        up, skip = conv.weight[:, :in_channels], conv.weight[:, in_channels:]
        flipped = up.flip(2, 3).transpose(0, 1)  # (in, out, 3, 3)
        kernel = 0
        for y in range(s):
            for x in range(s):
                kernel = kernel + F.pad(flipped, (x, s - 1 - x, y, s - 1 - y))
        self.up_weight = nn.Parameter(kernel)  # (in, out, s + 2, s + 2)
        self.skip_weight = nn.Parameter(skip) if skip.numel() else None  # (out, skip, 3, 3)
        self.bias, self.conv2, self.scale = conv.bias, block.conv2, s

    def forward(self, x, skip=None):
        x = F.conv_transpose2d(x, self.up_weight, self.bias, self.scale, padding=1)
        if skip is not None:
            x += F.conv2d(skip, self.skip_weight, padding=1)
        return self.conv2(F.relu_(x))
