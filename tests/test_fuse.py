"""dualunet.py, `fuse`: the inference form equals the network and survives torch.export."""

import copy

import pytest
import torch
from torch import nn

from dualunet import DecoderBlock, DualUNet, EfficientNetLite, FusedBlock, fold_batchnorm

NARROW = (32, 16, 16, 8, 8)


def trained_like(encoder="resnet18", image_skip=0):
    """A network whose norms, biases and layer scales are not those of a fresh one."""
    torch.manual_seed(0)
    model = DualUNet(num_classes=3, encoder=encoder, decoder_channels=NARROW,
                     image_skip=image_skip).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1)
            nn.init.normal_(module.bias, 0, 0.1)
        if hasattr(module, "gamma"):
            nn.init.normal_(module.gamma, 0, 0.3)
    return model


def difference(got, expected):
    """Relative error in norm of (logits, density), the worse of the two."""
    errors = []
    for a, b in zip(got, expected, strict=True):
        errors.append(((a - b).norm() / b.norm()).item())
    return max(errors)


@pytest.mark.parametrize("image_skip", [0, 8])
@pytest.mark.parametrize("encoder", ["resnet18", "efficientnet_lite0", "convnext_tiny"])
@torch.inference_mode()
def test_equal_maps_at_odd_sizes(encoder, image_skip):
    model, images = trained_like(encoder, image_skip), torch.rand(2, 3, 65, 90)
    expected, fused = model(images), model.fuse()
    assert difference(fused(images), expected) < 1e-5
    assert not any(isinstance(m, nn.BatchNorm2d | DecoderBlock) for m in fused.modules())

    # both ways to half precision run, and answer in single precision
    half = model.fuse(torch.bfloat16)(images)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = fused(images)
    for maps in (half, autocast):
        assert 0 < difference(maps, expected) < 0.1
        assert maps[0].dtype == maps[1].dtype == torch.float32


@pytest.mark.parametrize("scale", [1, 2, 4])
@pytest.mark.parametrize("skip_channels", [0, 3])
def test_block_is_exact_up_to_the_border(scale, skip_channels):
    torch.manual_seed(0)
    block = DecoderBlock(5, skip_channels, 4, scale).double().eval()
    fold_batchnorm(block)
    x = torch.rand(1, 5, 3, 2).double()
    skip = torch.rand(1, skip_channels, 3 * scale, 2 * scale).double() if skip_channels else None
    assert torch.allclose(FusedBlock(block, 5)(x, skip), block(x, skip), rtol=0, atol=1e-12)


def test_the_original_stays_as_it_was():
    model = trained_like(image_skip=8).train()
    before = copy.deepcopy(model.state_dict())
    fused = model.fuse()
    assert fused.config == model.config and fused.config is not model.config
    assert not fused.training and not any(p.requires_grad for p in fused.parameters())
    assert model.training and all(p.requires_grad for p in model.parameters())
    for parameter in fused.parameters():
        parameter.zero_()
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.filterwarnings("ignore:No complete tensor")  # channels-last weights; harmless on a CPU
def test_export_at_any_multiple_of_32_loads_and_agrees(tmp_path):
    """Batch and sides are dynamic; sides are multiples of 32, above 32."""
    shallow = EfficientNetLite((1, 2, 1, 1, 1, 1, 1), (8, 8, 16, 16, 24, 24, 32))
    fused = trained_like(shallow, image_skip=8).fuse()
    high = 32 * torch.export.Dim("high", min=2, max=512)
    wide = 32 * torch.export.Dim("wide", min=2, max=512)
    shapes = ({0: torch.export.Dim("batch"), 2: high, 3: wide},)
    exported = torch.export.export(fused, (torch.rand(2, 3, 64, 96),), dynamic_shapes=shapes)
    torch.export.save(exported, tmp_path / "network.pt2")
    loaded = torch.export.load(tmp_path / "network.pt2").module()
    for shape in [(1, 3, 96, 64), (3, 3, 128, 160)]:
        images = torch.rand(shape)
        assert difference(loaded(images), fused(images)) < 1e-6
