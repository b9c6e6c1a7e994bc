"""DualU-Net: one encoder and two U-Net decoders that find, outline and classify nuclei.

Anglada-Rotger et al., "Two heads are enough: DualU-Net, a fast and efficient architecture for
nuclei instance segmentation", MIDL 2025. Needs torch alone; copy this file anywhere:

    model = DualUNet(num_classes=5)                  # 5 kinds of nuclei; class 0 is background
    logits, density = model(torch.rand(2, 3, 256, 256))     # RGB in [0, 1]
    logits.shape, density.shape                      # (2, 6, 256, 256), (2, 1, 256, 256)

`num_classes` K excludes background everywhere: `logits` has K + 1 channels, 0 for background.
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
METADATA = {  # what a model file says of itself beside its architecture, and the defaults
    "class_names": None, "colors": None, "mpp": None, "licence": None,
    "combine": "max", "sigma": 5.0}
PUBLISHED_CLASSES = {  # K of the authors' checkpoints -> class names and their colours in overlays
    4: {"miscellaneous": (0, 255, 255), "inflammatory": (255, 0, 0),
        "epithelial": (0, 0, 255), "spindle-shaped": (0, 255, 0)},  # CoNSeP
    5: {"neoplastic": (255, 0, 0), "inflammatory": (0, 255, 0), "connective": (0, 0, 255),
        "dead": (255, 255, 0), "epithelial": (255, 165, 0)},  # PanNuke
}


# ---------------------------------------------------------------- encoders


class ResNetBlock(nn.Module):
    """Residual block, basic (3×3, 3×3) or bottleneck (1×1, 3×3, 1×1); torchvision's names."""

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
        self.channels = (64, *(c * expansion for c in (64, 128, 256, 512)))
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        for i, depth in enumerate(depths):
            blocks = [
                ResNetBlock(self.channels[i] if b == 0 else self.channels[i + 1], 64 * 2**i,
                            stride=2 if b == 0 and i > 0 else 1, bottleneck=bottleneck,
                            groups=groups, group_width=group_width)
                for b in range(depth)
            ]
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
    """Two linear layers over the last axis, GELU between; apart for timm's names."""

    def __init__(self, channels):
        super().__init__()
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class ConvNeXtBlock(nn.Module):
    """Depthwise 7×7, LayerNorm, MLP, layer scale; in (N, H, W, C) after the depthwise convolution,
    where LayerNorm and Linear need no transposition. timm's names."""

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
                ChannelNorm(in_channels, eps=1e-6), nn.Conv2d(in_channels, channels, 2, 2)
            )
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


ENCODERS = {
    "resnet18": lambda: ResNet((2, 2, 2, 2), bottleneck=False),
    "resnet34": lambda: ResNet((3, 4, 6, 3), bottleneck=False),
    "resnet50": lambda: ResNet((3, 4, 6, 3), bottleneck=True),
    "resnext50_32x4d": lambda: ResNet((3, 4, 6, 3), bottleneck=True, groups=32, group_width=4),
    "convnext_tiny": lambda: ConvNeXt((3, 3, 9, 3), (96, 192, 384, 768)),
    "convnext_base": lambda: ConvNeXt((3, 3, 27, 3), (128, 256, 512, 1024)),
}


# ---------------------------------------------------------------- decoder and network


class DecoderBlock(nn.Module):
    """Nearest upsampling, concatenation with the skip, twice 3×3 convolution, BatchNorm, ReLU."""

    def __init__(self, in_channels, skip_channels, out_channels, scale):
        super().__init__()
        self.scale = scale

        def conv(channels):
            return nn.Sequential(
                nn.Conv2d(channels, out_channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(out_channels),
                nn.ReLU(inplace=True),
            )

        self.conv1 = conv(in_channels + skip_channels)
        self.conv2 = conv(out_channels)

    def forward(self, x, skip=None):
        if self.scale > 1:
            x = F.interpolate(x, scale_factor=self.scale, mode="nearest")
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        return self.conv2(self.conv1(x))


class Decoder(nn.Module):
    """U-Net decoder from an encoder's five features to one map at full resolution."""

    def __init__(self, encoder_channels, encoder_strides, channels):
        super().__init__()
        inputs = (encoder_channels[-1], *channels)
        skips = (*reversed(encoder_channels[:-1]), 0)
        strides = (*reversed(encoder_strides), 1)
        scales = (a // b for a, b in zip(strides, strides[1:]))
        self.blocks = nn.ModuleList(map(DecoderBlock, inputs, skips, channels, scales))

    def forward(self, features):
        *skips, x = features
        for block, skip in zip(self.blocks, (*reversed(skips), None)):
            x = block(x, skip)
        return x


class DualUNet(nn.Module):
    """One encoder, one decoder for what each pixel is, one for where each nucleus is.

    `config` is the dict that rebuilds the model, plus what its file says of it (see METADATA).
    zoom: the network sees images enlarged so much, for the encoder halves them at its first layer:
    small and crowded nuclei survive it, in zoom² of the time. Ours; 1 is published.
    """

    def __init__(self, *, num_classes, encoder="resnext50_32x4d",
                 decoder_channels=(256, 128, 64, 32, 16), zoom=1.0):
        super().__init__()
        if encoder not in ENCODERS:
            raise ValueError(f"encoder is {encoder!r}; choose one of {', '.join(ENCODERS)}")
        if len(decoder_channels) != 5:
            raise ValueError(f"decoder_channels has {len(decoder_channels)} entries; "
                             "give 5, deepest first")
        if not 1 <= zoom <= 4:
            raise ValueError(f"zoom is {zoom}; expected 1 (published) to 4")
        self.config = {"num_classes": num_classes, "encoder": encoder,
                       "decoder_channels": tuple(decoder_channels), "zoom": zoom}
        self.encoder = ENCODERS[encoder]()
        self.decoder = Decoder(self.encoder.channels, self.encoder.strides, decoder_channels)
        self.decoder_count = Decoder(self.encoder.channels, self.encoder.strides, decoder_channels)
        self.segmentation_head = nn.Sequential(
            nn.Conv2d(decoder_channels[-1], num_classes + 1, 3, padding=1))
        self.count_head = nn.Sequential(nn.Conv2d(decoder_channels[-1], 1, 3, padding=1))
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for head in (self.segmentation_head, self.count_head):
            nn.init.normal_(head[0].weight, std=0.01)  # ours: starts near uniform classes, no peak

    def forward(self, images):
        """Raw maps of RGB images.

        images: (N, 3, H, W) float in [0, 1], any H and W; padded inside to multiples of 32.
        Returns logits (N, K + 1, H, W) and density (N, 1, H, W), both float32 under autocast too.
        """
        x = (images - self.mean) / self.std
        if self.config["zoom"] != 1:
            x = F.interpolate(x, scale_factor=self.config["zoom"], mode="bilinear")
        height, width = x.shape[-2:]
        if height % 32 or width % 32:  # replicated: unlike reflection it exists at any size
            x = F.pad(x, (0, -width % 32, 0, -height % 32), mode="replicate")
        features = self.encoder(x.to(next(self.encoder.parameters()).dtype))
        x, y = self.decoder(features), self.decoder_count(features)
        with torch.autocast(x.device.type, enabled=False):  # bf16 would change 1-2 % of the nuclei
            logits, density = self.segmentation_head(x.float()), self.count_head(y.float())
        maps = logits[..., :height, :width], density[..., :height, :width]
        if self.config["zoom"] != 1:
            maps = tuple(F.interpolate(values, images.shape[-2:], mode="bilinear")
                         for values in maps)
        return maps

    def fuse(self, dtype=None):
        """A frozen copy for inference: equal maps, to 1e-5 relative in float32, in 0.6 of the time.

        dtype: None, or half precision for all but the heads: autocast, which works too, casts the
        weights anew at every call. The decoders stay apart: merged into grouped convolutions, so
        that both read a feature at once, they were no faster, and slow in bf16 with 16 channels.
        """
        fused = copy.deepcopy(self).eval()
        fold_batchnorm(fused)
        inputs = (self.encoder.channels[-1], *self.config["decoder_channels"])
        for decoder in (fused.decoder, fused.decoder_count):
            decoder.blocks = nn.ModuleList(map(FusedBlock, decoder.blocks, inputs))
        for body in (fused.encoder, fused.decoder, fused.decoder_count):
            body.to(dtype=dtype)
        return fused.requires_grad_(False).to(memory_format=torch.channels_last)


# ---------------------------------------------------------------- inference form


def fold_batchnorm(module):
    """Folds BatchNorms into the convolutions before: bn2 into conv2, 1 into 0 of a Sequential."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            conv = name.replace("bn", "conv") if name.startswith("bn") else str(int(name) - 1)
            setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), child))
            setattr(module, name, nn.Identity())
        else:
            fold_batchnorm(child)


class FusedBlock(nn.Module):
    """A DecoderBlock, its BatchNorm folded, that neither upsamples nor concatenates.

    A 3×3 convolution of an s-fold nearest upsampling is a transposed convolution of stride s, whose
    kernel (s + 2)² sums the flipped 3×3 at s² offsets: at s = 2, 4 multiplications instead of 9.
    """

    def __init__(self, block, in_channels):
        super().__init__()
        conv, s = block.conv1[0], block.scale  # conv.weight: (out, in + skip, 3, 3)
        up, skip = conv.weight[:, :in_channels], conv.weight[:, in_channels:]
        flipped = up.flip(2, 3).transpose(0, 1)
        shifted = [F.pad(flipped, (x, s - 1 - x, y, s - 1 - y)) for y in range(s) for x in range(s)]
        self.up_weight = nn.Parameter(sum(shifted))  # (in, out, s + 2, s + 2)
        self.skip_weight = nn.Parameter(skip) if skip.numel() else None
        self.bias, self.conv2, self.scale = conv.bias, block.conv2, s

    def forward(self, x, skip=None):
        x = F.conv_transpose2d(x, self.up_weight, self.bias, self.scale, padding=1)
        if skip is not None:
            x += F.conv2d(skip, self.skip_weight, padding=1)
        return self.conv2(F.relu_(x))


# ---------------------------------------------------------------- loss


def dual_loss(logits, density, type_map, density_target, *, class_weights=None,
              ce_weight=1.0, dice_weight=1.0, density_weight=1.0):
    """Weighted cross-entropy + soft Dice over classes + mean squared error of the density.

    logits (N, K+1, H, W), density (N, 1, H, W), type_map (N, H, W) integer in 0..K or
    UNKNOWN_CLASS, density_target (N, 1, H, W), class_weights (K+1,) or None. Returns a dict of
    scalars: "ce", "dice", "mse" and their weighted sum "loss".

    The cross-entropy is the mean over pixels of weight · loss (published), not torch's weighted
    mean. A nucleus of unknown class is marginalised: its loss is −log of the summed nucleus
    probabilities, its weight the median nucleus weight; it counts in the background's Dice alone.
    """
    log_p = F.log_softmax(logits.float(), dim=1)
    unknown = type_map == UNKNOWN_CLASS
    target = type_map.long().masked_fill(unknown, 0)
    nll = -log_p.gather(1, target[:, None])[:, 0]  # (N, H, W)
    nll = torch.where(unknown, -log_p[:, 1:].logsumexp(dim=1), nll)
    if class_weights is not None:
        nll = nll * torch.where(unknown, class_weights[1:].median(), class_weights[target])

    known = ~unknown[:, None]
    truth = F.one_hot(target, logits.shape[1]).permute(0, 3, 1, 2) * known
    p = log_p.exp()
    p = torch.cat([p[:, :1], p[:, 1:] * known], dim=1)  # background is known everywhere
    overlap, total = (p * truth).sum(dim=(0, 2, 3)), (p + truth).sum(dim=(0, 2, 3))
    dice = 1 - ((2 * overlap + 1) / (total + 1)).mean()  # + 1: published eps

    terms = {"ce": nll.mean(), "dice": dice, "mse": F.mse_loss(density.float(), density_target)}
    terms["loss"] = ce_weight * terms["ce"] + dice_weight * dice + density_weight * terms["mse"]
    return terms


# ---------------------------------------------------------------- files


def read_checkpoint(path):
    """The plain dict in a torch file, on the CPU; code in it is never run.

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


def save_checkpoint(path, model, *, half=False, **extra):
    """Writes a self-describing file that `load_model` reads: whole or not at all.

    half: weights of two and more axes in float16 (norms and biases stay float32), for shipping.
    extra: plain values and state dicts stored beside the model (optimizer, epoch, ...).
    """
    state = {k: v.half() if half and v.ndim > 1 else v for k, v in model.state_dict().items()}
    config = {k: v for k, v in model.config.items() if k not in METADATA}
    metadata = {k: model.config.get(k, default) for k, default in METADATA.items()}
    temporary = f"{path}.tmp"
    with open(temporary, "wb") as file:
        torch.save({"model": state, "model_config": config, **metadata, **extra}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def check_keys(path, expected, got):
    """Raises ValueError naming what differs between two {name: tensor}; silent if nothing does."""

    def sample(names):
        return ", ".join(sorted(names)[:3]) + (
            f" and {len(names) - 3} more" if len(names) > 3 else "")

    missing, extra = expected.keys() - got.keys(), got.keys() - expected.keys()
    wrong = [k for k in expected.keys() & got.keys() if expected[k].shape != got[k].shape]
    problems = ([f"missing {sample(missing)}"] * bool(missing)
                + [f"left over {sample(extra)}"] * bool(extra))
    problems += [f"{k} is {tuple(got[k].shape)}, expected {tuple(expected[k].shape)}"
                 for k in sorted(wrong)[:3]]
    if problems:
        raise ValueError(f"{path}: does not fit the architecture: {'; '.join(problems)}")


def class_colors(class_names):
    """K RGB triples: published ones where the names are of one published set, else spread hues."""
    for published in PUBLISHED_CLASSES.values():
        if published.keys() >= set(class_names):
            return [published[name] for name in class_names]
    hues = [math.tau * (k + 0.35) / len(class_names) for k in range(len(class_names))]  # one: green
    return [tuple(round(127.5 + 127.5 * math.cos(hue - c * math.tau / 3)) for c in range(3))
            for hue in hues]


def recognise(path, state):
    """The constructor's arguments for a bare state dict, read from names and shapes.

    Raises: ValueError naming the keys that keep the closest of ENCODERS from fitting.
    """
    try:
        num_classes = state["segmentation_head.0.weight"].shape[:1].numel() - 1
        channels = tuple(state[f"decoder.blocks.{i}.conv1.0.weight"].shape[:1].numel()
                         for i in range(5))
    except KeyError as error:
        raise ValueError(f"{path}: no key {error}, so this is no DualU-Net; for an ImageNet "
                         "encoder use train.py --encoder-weights") from None
    if not all(0 < size < 2**16 for size in (num_classes, *channels)):
        raise ValueError(f"{path}: its sizes give {num_classes} classes and decoder channels "
                         f"{channels}; copy it again")
    candidates = []
    for encoder in ENCODERS:
        config = {"num_classes": num_classes, "encoder": encoder, "decoder_channels": channels}
        with torch.device("meta"):  # shapes without memory
            expected = DualUNet(**config).state_dict()
        shapes = ({k: v.shape for k, v in expected.items()}.items()
                  ^ {k: v.shape for k, v in state.items()}.items())
        candidates.append((len(shapes), config, expected))
    _, config, expected = min(candidates, key=lambda candidate: candidate[0])
    check_keys(path, expected, state)
    return config


def load_model(path, device="cpu"):
    """The model in one of our files or the authors', in float32 and eval mode.

    `model.config` holds what the file says of itself: class_names (list of K str), colors (K RGB
    triples), mpp (µm per pixel or None), licence, and how its density was trained (combine, sigma).
    A bare or "model"-wrapped state dict of the authors' is known by names and shapes; its density
    is a normalised sum. Raises: FileNotFoundError, ValueError (`read_checkpoint`, `check_keys`).
    """
    checkpoint = read_checkpoint(path)
    ours = "model_config" in checkpoint
    state = checkpoint.get("model", checkpoint.get("state_dict", checkpoint))
    if not isinstance(state, dict):
        raise ValueError(f"{path}: its weights are {type(state).__name__}; "
                         "expected a dict of tensors")
    state = {re.sub(r"^(module\.|_orig_mod\.)+", "", str(k)).replace(".timm_model.", "."): v
             for k, v in state.items() if isinstance(v, torch.Tensor)
             and v.layout == torch.strided and v.device.type == "cpu" and not v.is_complex()}
    config = checkpoint["model_config"] if ours else recognise(path, state)
    try:
        model = DualUNet(**config)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: its model_config fits no DualU-Net ({error}); "
                         "export it again") from None
    check_keys(path, model.state_dict(), state)
    model.load_state_dict(state)

    metadata = METADATA | ({k: checkpoint[k] for k in METADATA if k in checkpoint} if ours else
                           {"combine": "sum", "mpp": 0.25, "licence": "the authors' (CC BY-NC)"})
    metadata["class_names"] = metadata["class_names"] or list(
        not ours and PUBLISHED_CLASSES.get(config["num_classes"])
        or (f"class {k}" for k in range(1, config["num_classes"] + 1))
    )
    if len(metadata["class_names"]) != config["num_classes"]:
        raise ValueError(f"{path}: names {metadata['class_names']} for {config['num_classes']} "
                         "classes; expected one each")
    metadata["colors"] = metadata["colors"] or class_colors(metadata["class_names"])
    model.config.update(metadata)
    return model.to(device).eval()


FACEBOOK_NAMES = (  # pattern -> timm's name
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample."),
    (r"^(stages\.\d)\.(\d+)\.", r"\1.blocks.\2."),
    (r"\.dwconv\.", ".conv_dw."), (r"\.pwconv1\.", ".mlp.fc1."), (r"\.pwconv2\.", ".mlp.fc2."),
)
TORCHVISION_BLOCK = {  # inside features.{2i + 1}.{j}
    "block.0": "conv_dw", "block.2": "norm", "block.3": "mlp.fc1", "block.5": "mlp.fc2",
    "layer_scale": "gamma"}


def timm_name(key):
    """A ConvNeXt parameter's name in timm's dialect, from facebook's, torchvision's or its own."""
    if match := re.match(r"features\.(\d)\.(\d+)\.(.*)", key):  # torchvision
        index, j, rest = int(match[1]), match[2], match[3]
        if index % 2:
            for theirs, timm in TORCHVISION_BLOCK.items():
                rest = rest.replace(theirs, timm)
            return f"stages.{index // 2}.blocks.{j}.{rest}"
        return f"stem.{j}.{rest}" if index == 0 else f"stages.{index // 2}.downsample.{j}.{rest}"
    if not key.startswith("stages.") or ".blocks." not in key and ".downsample." not in key:
        for pattern, name in FACEBOOK_NAMES:
            key = re.sub(pattern, name, key)
    return key


def load_encoder_weights(model, path_or_url):
    """Loads ImageNet weights into `model.encoder`: a file, or a URL fetched by torch.hub.

    ResNet and ResNeXt in torchvision's names; ConvNeXt in timm's, facebook's or torchvision's. The
    classifier is ignored; any other key missing or left over is a ValueError that names it.
    """
    if re.match(r"https?://", str(path_or_url)):
        checkpoint = torch.hub.load_state_dict_from_url(
            path_or_url, map_location="cpu", weights_only=True)
    else:
        checkpoint = read_checkpoint(path_or_url)
    state = checkpoint.get("model", checkpoint.get("state_dict", checkpoint))
    if isinstance(model.encoder, ConvNeXt):
        state = {timm_name(k): v for k, v in state.items()}  # gamma may be (C, 1, 1)
        state = {k: v.flatten() if k.endswith("gamma") else v for k, v in state.items()}
    state = {k: v for k, v in state.items() if not re.match(r"(fc|head|norm|classifier)\.", k)}
    check_keys(path_or_url, model.encoder.state_dict(), state)
    model.encoder.load_state_dict(state)
