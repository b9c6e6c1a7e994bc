"""dualunet.py, `fuse`: the inference form equals the network, compiles, survives torch.export."""

import copy

import pytest
import torch
from torch import nn

from dualunet import ENCODERS, DecoderBlock, DualUNet, FusedBlock, fold_batchnorm

SMALL = (32, 16, 16, 8, 8)


def trained_like(encoder="resnet18"):
    """A network whose norms, biases and layer scales are no fresh one's, so that folding shows."""
    torch.manual_seed(0)
    model = DualUNet(num_classes=3, encoder=encoder, decoder_channels=SMALL).eval()
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
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("zoom", [1, 1.25])
@pytest.mark.parametrize("encoder", ENCODERS)
@torch.inference_mode()
def test_equal_maps_at_odd_sizes(encoder, zoom):
    model, images = trained_like(encoder), torch.rand(2, 3, 65, 90)
    model.config["zoom"] = zoom
    expected, fused = model(images), model.fuse()
    assert difference(fused(images), expected) < 1e-5
    assert not any(isinstance(m, nn.BatchNorm2d | DecoderBlock) for m in fused.modules())
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
    x, skip = (torch.rand(1, 5, 3, 2).double(),
               torch.rand(1, skip_channels, 3 * scale, 2 * scale).double())
    skip = skip if skip_channels else None
    assert torch.allclose(FusedBlock(block, 5)(x, skip), block(x, skip), rtol=0, atol=1e-12)


def test_the_original_stays_as_it_was():
    model = trained_like().train()
    before = copy.deepcopy(model.state_dict())
    fused = model.fuse()
    assert fused.config == model.config and fused.config is not model.config
    assert not fused.training and not any(p.requires_grad for p in fused.parameters())
    assert model.training and all(p.requires_grad for p in model.parameters())
    for parameter in fused.parameters():
        parameter.zero_()
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.filterwarnings("ignore:No complete tensor")  # channels-last weights; harmless on a CPU
def test_export_at_any_multiple_of_32_loads_and_agrees(tmp_path):
    """Batch and sides are dynamic; sides are multiples of 32, above 32."""
    fused, path = trained_like().fuse(), tmp_path / "network.pt2"
    high, wide = (32 * torch.export.Dim(name, min=2, max=512) for name in ("high", "wide"))
    shapes = ({0: torch.export.Dim("batch"), 2: high, 3: wide},)
    torch.export.save(
        torch.export.export(fused, (torch.rand(2, 3, 64, 96),), dynamic_shapes=shapes), path)
    loaded = torch.export.load(path).module()
    for shape in [(1, 3, 96, 64), (3, 3, 128, 160)]:
        images = torch.rand(shape)
        assert difference(loaded(images), fused(images)) < 1e-6
