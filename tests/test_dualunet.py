"""dualunet.py: shapes, gradients, loss, encoders of one's own, our checkpoint files."""

import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dualunet import (
    DENSITY_WEIGHT, ENCODERS, METADATA, UNKNOWN_CLASS, ConvNeXt, DualUNet, EfficientNetLite,
    InvertedResidual, ResNet, SameConv2d, class_colors, dual_loss, load_model, read_checkpoint,
    save_checkpoint)

NARROW = (16, 16, 8, 8, 8)


def small_model(encoder="efficientnet_lite0", num_classes=3, image_skip=0):
    torch.manual_seed(1)
    return DualUNet(num_classes=num_classes, encoder=encoder, decoder_channels=NARROW,
                    image_skip=image_skip)


class ToyEncoder(nn.Module):
    """Five strided convolutions: all that an encoder of one's own needs."""

    channels = (4, 6, 8, 10, 12)
    strides = (2, 4, 8, 16, 32)
    mean = (0.5, 0.5, 0.5)

    def __init__(self):
        super().__init__()
        self.steps = nn.ModuleList()
        before = 3
        for channels in self.channels:
            self.steps.append(nn.Conv2d(before, channels, 3, 2, 1))
            before = channels

    def forward(self, x):
        features = []
        for step in self.steps:
            x = step(x).relu()
            features.append(x)
        return features


# ---------------------------------------------------------------- network


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_give_the_features_that_they_declare(name):
    with torch.device("meta"):  # shapes without the work
        encoder = ENCODERS[name]()
        features = encoder(torch.rand(2, 3, 64, 96))
    for feature, channels, stride in zip(features, encoder.channels, encoder.strides, strict=True):
        assert feature.shape == (2, channels, 64 // stride, 96 // stride)


@pytest.mark.parametrize("kind, arguments", [
    (ResNet, {"depths": (1, 1, 1, 1), "bottleneck": False}),
    (ResNet, {"depths": (1, 2, 1, 1), "bottleneck": True, "groups": 32, "group_width": 4}),
    (ConvNeXt, {"depths": (1, 2, 1, 1), "dims": (8, 16, 24, 32)}),
    (EfficientNetLite, {"depths": (1, 2, 1, 1, 1, 1, 1), "widths": (8, 8, 16, 16, 24, 24, 32)})])
def test_full_resolution_at_any_size_and_every_parameter_learns(kind, arguments):
    model = small_model(kind(**arguments), image_skip=4)
    logits, density = model(torch.rand(2, 3, 33, 50))
    assert logits.shape == (2, 4, 33, 50)
    assert density.shape == (2, 1, 33, 50)
    type_map = torch.randint(0, 4, (2, 33, 50))
    dual_loss(logits, density, type_map, torch.rand(2, 1, 33, 50))["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_one_pixel_and_batched_equals_single():
    model = small_model().eval()
    images = torch.rand(2, 3, 1, 1)
    with torch.no_grad():
        together = model(images)[0]
        alone = model(images[1:])[0]
    assert torch.allclose(together[1], alone[0], atol=1e-6)


def test_padding_is_replication_to_multiples_of_32():
    model = small_model(image_skip=4).eval()
    image = torch.rand(1, 3, 40, 64)
    padded = F.pad(image, (0, 0, 0, 24), mode="replicate")
    with torch.no_grad():
        assert torch.allclose(model(image)[1], model(padded)[1][:, :, :40], atol=1e-6)


def test_image_skip_reaches_the_last_block_of_both_decoders():
    model = small_model(image_skip=4).eval()
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        before = model(image)
        model.image_skip[0].weight.mul_(-2)
        after = model(image)
    assert not torch.allclose(before[0], after[0])
    assert not torch.allclose(before[1], after[1])
    assert small_model().image_skip is None


def test_heads_answer_in_float32_under_autocast():
    model = small_model(image_skip=4).eval()
    with torch.autocast("cpu", torch.bfloat16):
        logits, density = model(torch.rand(1, 3, 32, 32))
    assert logits.dtype == density.dtype == torch.float32


@pytest.mark.parametrize("encoder, num_classes, channels, image_skip, millions", [
    ("resnext50_32x4d", 5, (256, 128, 64, 32, 16), 0, 41.007),  # the authors' checkpoint
    ("convnext_base", 5, (256, 128, 64, 32, 16), 0, 97.81),  # the authors' checkpoint
    ("efficientnet_lite2", 4, (192, 96, 48, 32, 16), 16, 7.46),  # ours
])
def test_numbers_of_parameters(encoder, num_classes, channels, image_skip, millions):
    with torch.device("meta"):
        model = DualUNet(num_classes=num_classes, encoder=encoder, decoder_channels=channels,
                         image_skip=image_skip)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize("kernel, before, after", [(3, 0, 1), (5, 1, 2)])
@pytest.mark.parametrize("size", [8, 10])
def test_strided_convolution_pads_as_tensorflow(kernel, before, after, size):
    conv = SameConv2d(2, 3, kernel, 2)
    x = torch.rand(1, 2, size, size)
    padded = F.pad(x, (before, after, before, after))
    expected = F.conv2d(padded, conv.weight, conv.bias, stride=2)
    assert expected.shape[-1] == math.ceil(size / 2)  # the size that "same" promises
    assert torch.equal(conv(x), expected)


def test_efficientnet_lite_pads_its_strided_convolutions_so():
    encoder = ENCODERS["efficientnet_lite0"]()
    strided = [m for m in encoder.modules() if isinstance(m, nn.Conv2d) and m.stride[0] == 2]
    assert len(strided) == 5
    assert all(isinstance(conv, SameConv2d) and conv.padding == (0, 0) for conv in strided)
    # one pixel moves the answer of those kernels alone that cover it
    x = torch.zeros(1, 3, 8, 8)
    x[0, :, 0, 0] = 1
    answer = encoder.stem[0](x)
    assert torch.allclose(answer[0, :, 0, 0], encoder.stem[0].weight[:, :, 0, 0].sum(1), atol=1e-6)
    assert answer[0, :, 1:].abs().sum() == 0


def test_inverted_residual_has_a_shortcut_where_nothing_changes():
    assert InvertedResidual(8, 8, kernel=3, stride=1, expansion=6).shortcut
    assert not InvertedResidual(8, 8, kernel=3, stride=2, expansion=6).shortcut
    assert not InvertedResidual(8, 9, kernel=3, stride=1, expansion=6).shortcut
    block = InvertedResidual(8, 8, kernel=3, stride=1, expansion=6).eval()
    nn.init.zeros_(block.project[0].weight)
    x = torch.rand(1, 8, 4, 4)
    assert torch.equal(block(x), x)


def test_inputs_are_normalised_as_the_encoder_was_trained():
    image = torch.full((1, 3, 1, 1), 0.7)
    lite = small_model()
    assert torch.allclose((image - lite.mean) / lite.std, (255 * image - 127) / 128)
    resnet = small_model("resnet18")
    assert resnet.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert "mean" not in resnet.state_dict()


def test_constructor_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="'vgg'; choose one of resnet18.* or pass a module"):
        DualUNet(num_classes=1, encoder="vgg")
    with pytest.raises(ValueError, match="has 4 entries; give 5"):
        DualUNet(num_classes=1, decoder_channels=(8, 8, 8, 8))
    encoder = ToyEncoder()
    encoder.channels = encoder.channels[:4]
    with pytest.raises(ValueError, match="the encoder's channels are .*; expected five of each"):
        DualUNet(num_classes=1, encoder=encoder)
    with pytest.raises(ValueError, match="images are torch.uint8; .* divide by 255"):
        small_model()(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


# ---------------------------------------------------------------- an encoder of one's own


def test_own_encoder_plugs_in_trains_saves_and_loads(tmp_path):
    torch.manual_seed(0)
    encoder = ToyEncoder()
    before = encoder.steps[0].weight.clone()
    model = DualUNet(num_classes=2, encoder=encoder, decoder_channels=NARROW, image_skip=4)
    assert torch.equal(encoder.steps[0].weight, before)  # keeps its weights
    assert model.mean.flatten().tolist() == [0.5, 0.5, 0.5]

    # a step of training changes it
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    logits, density = model(torch.rand(2, 3, 64, 64))
    type_map = torch.randint(0, 3, (2, 64, 64))
    dual_loss(logits, density, type_map, torch.rand(2, 1, 64, 64))["loss"].backward()
    optimizer.step()
    assert not torch.equal(encoder.steps[0].weight, before)

    # its file names the class, and needs a module to load into
    save_checkpoint(tmp_path / "toy.pt", model)
    model.eval()
    image = torch.rand(1, 3, 40, 40)
    with torch.no_grad():
        loaded = load_model(tmp_path / "toy.pt", encoder=ToyEncoder())
        assert torch.equal(loaded(image)[0], model(image)[0])
        fused = model.fuse()(image)[0]
        assert torch.allclose(fused, model(image)[0], atol=1e-5)
    assert loaded.config["encoder"] == "ToyEncoder"
    with pytest.raises(ValueError, match="toy.pt: .*encoder is 'ToyEncoder'; choose .* pass a mod"):
        load_model(tmp_path / "toy.pt")


# ---------------------------------------------------------------- loss


def test_loss_equals_plain_formulas():
    torch.manual_seed(2)
    logits, density = torch.randn(2, 3, 4, 5), torch.randn(2, 1, 4, 5)
    type_map, target = torch.randint(0, 3, (2, 4, 5)), torch.rand(2, 1, 4, 5)
    weights = torch.tensor([0.5, 2.0, 3.0])
    terms = dual_loss(logits, density, type_map, target, class_weights=weights)

    # pixel by pixel
    p = logits.softmax(1)
    ce, overlap, total = 0.0, torch.zeros(3), torch.zeros(3)
    for n, y, x in np.ndindex(2, 4, 5):
        k = type_map[n, y, x]
        ce -= weights[k] * p[n, k, y, x].log()
        overlap[k] += p[n, k, y, x]
        total[k] += 1
        total += p[n, :, y, x]
    ce = ce.item() / 40
    dice = 1 - ((2 * overlap + 1) / (total + 1)).mean().item()
    mse = ((density - target) ** 2).mean().item()

    assert terms["ce"].item() == pytest.approx(ce, rel=1e-5)
    assert terms["dice"].item() == pytest.approx(dice, rel=1e-5)
    assert terms["mse"].item() == pytest.approx(mse, rel=1e-5)
    assert DENSITY_WEIGHT == 20
    assert terms["loss"].item() == pytest.approx(ce + dice + 20 * mse, rel=1e-5)


def test_weights_of_the_terms():
    logits, density = torch.zeros(1, 2, 2, 2), torch.zeros(1, 1, 2, 2)
    type_map = torch.zeros(1, 2, 2, dtype=torch.uint8)
    terms = dual_loss(logits, density, type_map, density + 0.5, ce_weight=2, dice_weight=3,
                      density_weight=1)
    assert terms["ce"].item() == pytest.approx(math.log(2))
    assert terms["mse"].item() == pytest.approx(0.25)
    expected = 2 * terms["ce"] + 3 * terms["dice"] + terms["mse"]
    assert terms["loss"].item() == pytest.approx(expected.item())


def test_unknown_class_teaches_nucleus_but_no_class():
    logits = torch.zeros(1, 4, 2, 2, requires_grad=True)  # of 4 equal probabilities, 3 are nuclei
    density = torch.zeros(1, 1, 2, 2)
    terms = dual_loss(logits, density, torch.full((1, 2, 2), UNKNOWN_CLASS), density)
    assert terms["ce"].item() == pytest.approx(-math.log(3 / 4), rel=1e-5)
    terms["loss"].backward()
    assert (logits.grad[:, 0] > 0).all()  # background falls
    assert torch.allclose(logits.grad[:, 1], logits.grad[:, 2])  # classes alike


def test_unknown_class_weighs_as_the_median_class_and_counts_in_no_class_dice():
    torch.manual_seed(3)
    logits, density = torch.randn(1, 4, 1, 2), torch.zeros(1, 1, 1, 2)
    type_map = torch.tensor([[[2, UNKNOWN_CLASS]]])
    weights = torch.tensor([1.0, 7.0, 3.0, 5.0])
    terms = dual_loss(logits, density, type_map, density, class_weights=weights)
    p = logits.softmax(1)[0, :, 0]  # (4, 2)
    ce = (-3 * p[2, 0].log() - 5 * p[1:, 1].sum().log()) / 2
    assert terms["ce"].item() == pytest.approx(ce.item(), rel=1e-5)

    # background sees both pixels, the classes only the known one
    overlap = torch.stack([torch.zeros(()), torch.zeros(()), p[2, 0], torch.zeros(())])
    total = torch.stack([p[0].sum(), p[1, 0], p[2, 0] + 1, p[3, 0]])
    dice = 1 - ((2 * overlap + 1) / (total + 1)).mean()
    assert terms["dice"].item() == pytest.approx(dice.item(), rel=1e-5)


def test_loss_of_perfect_maps_is_zero_and_of_empty_truth_finite():
    type_map = torch.tensor([[[0, 1], [2, 0]]])
    logits = 100.0 * F.one_hot(type_map, 3).permute(0, 3, 1, 2)
    target = torch.rand(1, 1, 2, 2)
    assert dual_loss(logits, target, type_map, target)["loss"].item() == pytest.approx(0, abs=1e-5)
    empty = torch.zeros(1, 2, 2, dtype=torch.uint8)
    assert torch.isfinite(dual_loss(logits, target, empty, target)["loss"])


def test_one_batch_overfits():
    model = small_model(ToyEncoder(), num_classes=2, image_skip=8)
    images = torch.rand(2, 3, 64, 64)
    type_map = torch.zeros(2, 64, 64, dtype=torch.uint8)
    type_map[:, 10:30, 10:30] = 1
    type_map[:, 40:60, 30:50] = 2
    images += 0.5 * type_map[:, None]
    density = (type_map[:, None] > 0).float()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = dual_loss(*model(images), type_map, density)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.15 * losses[0]


def test_colours():
    assert class_colors(["epithelial", "inflammatory"]) == [(0, 0, 255), (255, 0, 0)]  # CoNSeP's
    assert class_colors(["dead"]) == [(255, 255, 0)]  # PanNuke's
    assert len(set(class_colors(list("abcdef")))) == 6


# ---------------------------------------------------------------- files


def test_checkpoint_explains_itself(tmp_path):
    model = small_model(image_skip=4).eval()
    model.config |= {"class_names": ["a", "b", "c"], "colors": [(1, 2, 3)] * 3, "mpp": 0.25,
                     "licence": "MIT", "sigma": 2.5, "reconstruct": {"min_distance": 1},
                     "tile": 256, "halo": 32}
    save_checkpoint(tmp_path / "m.pt", model, epoch=3)
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt"]  # nothing temporary is left

    loaded, image = load_model(tmp_path / "m.pt"), torch.rand(1, 3, 32, 32)
    assert not loaded.training
    assert loaded.config == model.config
    assert METADATA.keys() <= loaded.config.keys()
    with torch.no_grad():
        assert torch.equal(model(image)[0], loaded(image)[0])
    assert read_checkpoint(tmp_path / "m.pt")["epoch"] == 3


def test_a_silent_checkpoint_gets_plain_names(tmp_path):
    save_checkpoint(tmp_path / "m.pt", small_model())
    config = load_model(tmp_path / "m.pt").config
    assert config["class_names"] == ["class 1", "class 2", "class 3"]
    assert len(config["colors"]) == 3
    assert (config["mpp"], config["sigma"], config["reconstruct"]) == (None, 5.0, {})


def test_half_precision_file_is_half_the_size_and_loads_as_float32(tmp_path):
    model = small_model()
    save_checkpoint(tmp_path / "full.pt", model)
    save_checkpoint(tmp_path / "half.pt", model, half=True)
    full, half = tmp_path / "full.pt", tmp_path / "half.pt"
    assert half.stat().st_size < 0.6 * full.stat().st_size
    loaded = load_model(half)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    for name, value in model.state_dict().items():
        assert torch.allclose(loaded.state_dict()[name], value, rtol=1e-3, atol=1e-4), name


class Code:
    """Something that only its own code can rebuild."""


def test_wrong_files_end_in_a_sentence(tmp_path):
    model = small_model()
    state = model.state_dict()
    config = {"num_classes": 3, "encoder": "efficientnet_lite0", "decoder_channels": NARROW}

    def ours(**changes):
        return {"model": state, "model_config": config} | changes

    without = {name: value for name, value in state.items() if name != "encoder.stem.0.weight"}
    cases = {  # file -> content, words of the sentence
        "list.pt": ([1], "expected a dict of tensors, got list"),
        "code.pt": ({"model": Code()}, "holds code .*Code.*never run; save its state_dict alone"),
        "bare.pt": (state, "not a file of ours; convert it: python convert.py"),
        "nothing.pt": (ours(model=[1]), "not a file of ours"),
        "missing.pt": (ours(model=without), "missing encoder.stem.0.weight"),
        "extra.pt": (ours(model=state | {"third.weight": torch.ones(1)}),
                     "left over third.weight"),
        "size.pt": (ours(model=state | {"density_head.bias": torch.ones(2)}),
                    r"density_head.bias is \(2,\), expected \(1,\)"),
        "nan.pt": (ours(model=state | {"density_head.bias": torch.tensor([torch.nan])}),
                   "density_head.bias holds NaN or infinity; use another checkpoint"),
        "option.pt": (ours(model_config=config | {"depth": 3}), "fits no DualU-Net .*depth"),
        "encoder.pt": (ours(model_config=config | {"encoder": "vgg"}), "fits no .*choose one of"),
        "names.pt": (ours(class_names=["a"]), r"names \['a'\] for 3 classes; expected one each"),
    }
    for name, (content, words) in cases.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=f"{name}: .*{words}"):
            load_model(tmp_path / name)


def test_damaged_files_end_in_a_sentence(tmp_path):
    save_checkpoint(tmp_path / "whole.pt", small_model())
    content = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[:-1000])
    (tmp_path / "text.pt").write_text("no weights")
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("cut.pt", "text.pt", "empty.pt"):
        with pytest.raises(ValueError, match=f"{name}: (damaged|not a torch checkpoint)"):
            load_model(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="none.pt: no such checkpoint; give the path"):
        load_model(tmp_path / "none.pt")


def test_works_alone_in_an_empty_folder(root, tmp_path):
    shutil.copy(root / "dualunet.py", tmp_path)
    code = ("import torch, dualunet as d; m = d.DualUNet(num_classes=2, encoder='resnet18');"
            "print(*m(torch.rand(1, 3, 40, 40))[0].shape)")
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                            text=True, check=True)
    assert result.stdout.split() == ["1", "3", "40", "40"]


@pytest.mark.parametrize("name, value", [
    ("colors", 1.5), ("class_names", [True]), ("reconstruct", 3), ("tile", "large")])
def test_metadata_of_another_type_is_refused(tmp_path, name, value):
    model = DualUNet(num_classes=1, encoder="efficientnet_lite0", decoder_channels=(8,) * 5)
    path = tmp_path / "model.pt"
    save_checkpoint(path, model)
    torch.save(read_checkpoint(path) | {name: value}, path)
    with pytest.raises(ValueError, match=f"model.pt: its {name} is .*; convert it again"):
        load_model(path)
