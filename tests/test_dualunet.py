"""dualunet.py: shapes, gradients, loss, our files and others', parity with the authors' network."""

import re
import shutil
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch

from dualunet import (
    ENCODERS, METADATA, PUBLISHED_CLASSES, UNKNOWN_CLASS, DualUNet, class_colors, dual_loss,
    load_encoder_weights, load_model, read_checkpoint, save_checkpoint,
)

SMALL = (16, 16, 8, 8, 8)


def small_model(encoder="resnet18", num_classes=3):
    torch.manual_seed(1)
    return DualUNet(num_classes=num_classes, encoder=encoder, decoder_channels=SMALL)


# ---------------------------------------------------------------- network


@pytest.mark.parametrize("encoder", ENCODERS)
def test_full_resolution_at_any_size_and_every_parameter_learns(encoder):
    model = small_model(encoder)
    logits, density = model(torch.rand(2, 3, 33, 70))
    assert logits.shape == (2, 4, 33, 70) and density.shape == (2, 1, 33, 70)
    type_map = torch.randint(0, 4, (2, 33, 70))
    dual_loss(logits, density, type_map, torch.rand(2, 1, 33, 70))["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_one_pixel_and_batched_equals_single():
    model = small_model().eval()
    images = torch.rand(2, 3, 1, 1)
    with torch.no_grad():
        together = model(images)[0]
        assert torch.allclose(together[1], model(images[1:])[0][0], atol=1e-6)


def test_padding_is_replication_to_multiples_of_32():
    model = small_model().eval()
    image = torch.rand(1, 3, 40, 64)
    padded = torch.nn.functional.pad(image, (0, 0, 0, 24), mode="replicate")
    with torch.no_grad():
        assert torch.allclose(model(image)[1], model(padded)[1][:, :, :40], atol=1e-6)


def test_zoom_is_the_network_on_the_enlarged_image():
    model, image = small_model().eval(), torch.rand(1, 3, 34, 70)
    zoomed = DualUNet(**model.config | {"zoom": 1.5}).eval()
    zoomed.load_state_dict(model.state_dict())
    resized = lambda maps, size: torch.nn.functional.interpolate(maps, size, mode="bilinear")
    with torch.no_grad():
        for got, expected in zip(zoomed(image), model(resized(image, (51, 105))), strict=True):
            assert got.shape[2:] == (34, 70)
            assert torch.allclose(got, resized(expected, (34, 70)), atol=1e-4)
        assert not torch.allclose(zoomed(image)[1], model(image)[1],
                                  atol=2e-2 * model(image)[1].abs().max())


def test_heads_answer_in_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert {t.dtype for t in small_model().eval()(torch.rand(1, 3, 32, 32))} == {torch.float32}


def test_parameter_counts_are_the_papers():
    def count(encoder):
        with torch.device("meta"):
            return sum(
                p.numel() for p in DualUNet(num_classes=5, encoder=encoder).parameters()) / 1e6

    assert count("resnext50_32x4d") == pytest.approx(41.007, abs=1e-3)
    assert count("convnext_base") == pytest.approx(97.81, abs=0.01)


@pytest.mark.parametrize("name, encoder", [
    ("resnext50", "resnext50_32x4d"), ("convnext", "convnext_base")])
def test_answers_as_the_authors_network(name, encoder, root, tmp_path):
    """The arrays hold what the authors' network answers to the weights and image made up here."""
    def tensor(key, shape):
        rng = np.random.default_rng(zlib.crc32(key.encode()))
        if key.endswith("num_batches_tracked"):
            return torch.tensor(1)
        if key.endswith("running_var"):
            value = rng.uniform(0.75, 1.25, shape)
        elif key.endswith("gamma"):
            value = rng.uniform(0.1, 0.4, shape)
        elif len(shape) > 1:
            value = rng.standard_normal(shape) * np.sqrt(1.4 / np.prod(shape[1:]))
        elif key.endswith("weight"):
            value = rng.uniform(0.75, 1.25, shape)
        else:
            value = rng.standard_normal(shape) * 0.05
        return torch.from_numpy(value.astype(np.float32))

    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in
                  DualUNet(num_classes=5, encoder=encoder).state_dict().items()}
    theirs = {k.replace("encoder.", "encoder.timm_model.") if name == "convnext" else k: shape
              for k, shape in shapes.items()}
    torch.save({"model": {f"module.{k}": tensor(k, shape) for k, shape in theirs.items()}},
               tmp_path / "theirs.pth")
    model = load_model(tmp_path / "theirs.pth")
    assert model.config["encoder"] == encoder and model.config["combine"] == "sum"
    assert model.config["class_names"] == list(PUBLISHED_CLASSES[5])

    image = torch.from_numpy(np.random.default_rng(1).random((2, 3, 96, 160), dtype=np.float32))
    with torch.no_grad():
        logits, density = model(image)
    golden = np.load(root / "tests" / "golden" / f"golden_{name}.npz")
    for key, value in (("logits", logits), ("density", density)):
        error = np.abs(value[:, :, ::4, ::4].numpy() - golden[key]).max()
        assert error <= 1e-4 * np.abs(golden[key]).max()


# ---------------------------------------------------------------- loss


def test_loss_equals_plain_formulas():
    torch.manual_seed(2)
    logits, density = torch.randn(2, 3, 4, 5), torch.randn(2, 1, 4, 5)
    type_map, target = torch.randint(0, 3, (2, 4, 5)), torch.rand(2, 1, 4, 5)
    weights = torch.tensor([0.5, 2.0, 3.0])
    terms = dual_loss(logits, density, type_map, target, class_weights=weights, density_weight=20)

    p = logits.softmax(1)
    ce, overlap, total = 0.0, torch.zeros(3), torch.zeros(3)
    for n, y, x in np.ndindex(2, 4, 5):
        k = type_map[n, y, x]
        ce -= weights[k] * p[n, k, y, x].log()
        overlap[k] += p[n, k, y, x]
        total[k] += 1
        total += p[n, :, y, x]
    assert terms["ce"].item() == pytest.approx((ce / 40).item(), rel=1e-5)
    assert terms["dice"].item() == pytest.approx(
        1 - ((2 * overlap + 1) / (total + 1)).mean().item(), rel=1e-5)
    assert terms["mse"].item() == pytest.approx(((density - target) ** 2).mean().item(), rel=1e-5)
    assert terms["loss"].item() == pytest.approx(
        (terms["ce"] + terms["dice"] + 20 * terms["mse"]).item(), rel=1e-5)


def test_unknown_class_teaches_nucleus_but_no_class():
    logits = torch.zeros(1, 4, 2, 2, requires_grad=True)  # of 4 equal probabilities, 3 are nuclei
    density = torch.zeros(1, 1, 2, 2)
    terms = dual_loss(logits, density, torch.full((1, 2, 2), UNKNOWN_CLASS), density)
    assert terms["ce"].item() == pytest.approx(-np.log(3 / 4), rel=1e-5)
    terms["loss"].backward()
    assert (logits.grad[:, 0] > 0).all()  # background falls
    assert torch.allclose(logits.grad[:, 1], logits.grad[:, 2])  # classes alike


def test_loss_of_perfect_maps_is_zero_and_of_empty_truth_finite():
    type_map = torch.tensor([[[0, 1], [2, 0]]])
    logits = 100.0 * torch.nn.functional.one_hot(type_map, 3).permute(0, 3, 1, 2)
    target = torch.rand(1, 1, 2, 2)
    assert dual_loss(logits, target, type_map, target)["loss"].item() == pytest.approx(0, abs=1e-5)
    assert torch.isfinite(
        dual_loss(logits, target, torch.zeros(1, 2, 2, dtype=torch.uint8), target)["loss"])


# ---------------------------------------------------------------- files


def test_checkpoint_explains_itself(tmp_path):
    model = small_model().eval()
    model.config |= {"class_names": ["a", "b", "c"], "colors": [(1, 2, 3)] * 3, "mpp": 0.25,
                     "licence": "MIT"}
    save_checkpoint(tmp_path / "m.pt", model, epoch=3)
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt"]  # nothing temporary is left
    loaded, image = load_model(tmp_path / "m.pt"), torch.rand(1, 3, 32, 32)
    assert not loaded.training and loaded.config == {**METADATA, **model.config}
    with torch.no_grad():
        assert torch.equal(model(image)[0], loaded(image)[0])
    assert read_checkpoint(tmp_path / "m.pt")["epoch"] == 3


def test_half_precision_file_is_half_the_size_and_loads_as_float32(tmp_path):
    model = small_model()
    save_checkpoint(tmp_path / "full.pt", model)
    save_checkpoint(tmp_path / "half.pt", model, half=True)
    assert (tmp_path / "half.pt").stat().st_size < 0.55 * (tmp_path / "full.pt").stat().st_size
    assert {p.dtype for p in load_model(tmp_path / "half.pt").parameters()} == {torch.float32}


def test_bare_state_dicts_of_every_encoder_are_recognised(tmp_path):
    for encoder in ("resnet18", "resnet34", "convnext_tiny"):
        torch.save(small_model(encoder).state_dict(), tmp_path / "bare.pth")
        config = load_model(tmp_path / "bare.pth").config
        assert (config["encoder"], config["decoder_channels"], config["num_classes"]) == (
            encoder, SMALL, 3)
        assert (config["class_names"] == ["class 1", "class 2", "class 3"]
                and len(config["colors"]) == 3)


def test_wrong_files_end_in_a_sentence(tmp_path):
    model = small_model()
    state = model.state_dict()

    class Code:
        pass

    sys.modules[__name__].Code = Code
    Code.__qualname__ = "Code"
    cases = {
        "text.pt": (lambda p: p.write_text("no weights"), "not a torch checkpoint"),
        "code.pt": (lambda p: torch.save({"model": Code()}, p), "holds code .*never run"),
        "list.pt": (lambda p: torch.save([1], p), "expected a dict"),
        "other.pt": (lambda p: torch.save({"fc.weight": torch.ones(1)}, p),
                     "no key 'segmentation_head.0.weight'"),
        "missing.pt": (lambda p: torch.save({k: v for k, v in state.items()
                                             if k != "encoder.conv1.weight"}, p),
                       "missing encoder.conv1.weight"),
        "extra.pt": (lambda p: torch.save(state | {"third_head.weight": torch.ones(1)}, p),
                     "left over third_head.weight"),
        "size.pt": (lambda p: torch.save(state | {"count_head.0.bias": torch.ones(2)}, p),
                    r"count_head.0.bias is \(2,\), expected \(1,\)"),
    }
    conv = "encoder.conv1.weight"
    for kind, odd in (("sparse", state[conv].to_sparse()), ("complex", state[conv] * 1j),
                      ("meta", state[conv].to("meta"))):
        cases[f"{kind}.pt"] = (lambda p, odd=odd: torch.save(state | {conv: odd}, p),
                               f"missing {conv}")
    for kind, odd in (("scalar", torch.zeros(())),
                      ("empty", state["segmentation_head.0.weight"][:0]),
                      ("huge", torch.zeros(1).expand(2**40))):
        cases[f"{kind}.pt"] = (lambda p, odd=odd: torch.save(
            state | {"segmentation_head.0.weight": odd}, p), "copy it again")
    for name, (write, words) in cases.items():
        write(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name}.*{words}"):
            load_model(tmp_path / name)
    whole = tmp_path / "whole.pt"
    save_checkpoint(whole, model)
    (tmp_path / "cut.pt").write_bytes(whole.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="cut.pt: (damaged|not a torch)"):
        load_model(tmp_path / "cut.pt")
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        load_model(tmp_path / "none.pt")


def test_constructor_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="choose one of resnet18"):
        DualUNet(num_classes=1, encoder="vgg")
    with pytest.raises(ValueError, match="has 4 entries; give 5"):
        DualUNet(num_classes=1, decoder_channels=(8, 8, 8, 8))
    with pytest.raises(ValueError, match="zoom is nan; expected 1"):
        DualUNet(num_classes=1, zoom=float("nan"))


def to_facebook(key):
    key = re.sub(r"^stem\.", "downsample_layers.0.", key)
    key = re.sub(r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1.", key).replace(
        ".blocks.", ".")
    return key.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")


def to_torchvision(key):
    key = re.sub(r"^stem\.", "features.0.", key)
    key = re.sub(r"^stages\.(\d)\.downsample\.", lambda m: f"features.{2 * int(m[1])}.", key)
    key = re.sub(r"^stages\.(\d)\.blocks\.", lambda m: f"features.{2 * int(m[1]) + 1}.", key)
    for timm, theirs in (("conv_dw", "block.0"), ("norm", "block.2"), ("mlp.fc1", "block.3"),
                         ("mlp.fc2", "block.5"), ("gamma", "layer_scale")):
        key = key.replace(f".{timm}", f".{theirs}")
    return key


@pytest.mark.parametrize("dialect, rename, head", [
    ("timm", str, "head.fc.weight"), ("facebook", to_facebook, "head.weight"),
    ("facebook", to_facebook, "norm.bias"), ("torchvision", to_torchvision, "classifier.2.weight"),
])
def test_convnext_weights_in_every_dialect(dialect, rename, head, tmp_path):
    source, target = small_model("convnext_tiny"), DualUNet(num_classes=1, encoder="convnext_tiny")
    state = {rename(k): v[:, None, None] if dialect == "torchvision" and k.endswith("gamma") else v
             for k, v in source.encoder.state_dict().items()}
    torch.save({"model": state | {head: torch.ones(3)}}, tmp_path / "imagenet.pth")
    load_encoder_weights(target, str(tmp_path / "imagenet.pth"))
    for a, b in zip(source.encoder.state_dict().values(), target.encoder.state_dict().values()):
        assert torch.equal(a, b)


def test_resnet_weights_and_wrong_ones(tmp_path):
    source, target = small_model(), DualUNet(num_classes=1, encoder="resnet18")
    state = source.encoder.state_dict()
    torch.save(state | {"fc.weight": torch.ones(2), "fc.bias": torch.ones(2)}, tmp_path / "r.pth")
    load_encoder_weights(target, tmp_path / "r.pth")
    assert torch.equal(target.encoder.layer4[1].conv2.weight, source.encoder.layer4[1].conv2.weight)
    with pytest.raises(ValueError, match="missing layer1.2.bn1.bias.* more"):
        load_encoder_weights(small_model("resnet34"), str(tmp_path / "r.pth"))
    torch.save(state | {"layer9.weight": torch.ones(1)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="left over layer9.weight"):
        load_encoder_weights(target, str(tmp_path / "w.pth"))


def test_weights_from_a_url_go_through_torch_hub(monkeypatch):
    source, target = small_model(), DualUNet(num_classes=1, encoder="resnet18")
    asked = {}

    def fetch(url, **kwargs):
        asked.update(kwargs, url=url)
        return source.encoder.state_dict()

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    load_encoder_weights(target, "https://example.org/resnet18.pth")
    assert asked["url"].startswith("https://") and asked["weights_only"] is True
    assert torch.equal(target.encoder.conv1.weight, source.encoder.conv1.weight)


def test_colours():
    assert class_colors(["epithelial", "inflammatory"]) == [(0, 0, 255), (255, 0, 0)]  # CoNSeP's
    assert class_colors(["dead"]) == [(255, 255, 0)]  # PanNuke's
    assert len(set(class_colors(list("abcdef")))) == 6


def test_works_alone_in_an_empty_folder(root, tmp_path):
    shutil.copy(root / "dualunet.py", tmp_path)
    code = ("import torch, dualunet as d; m = d.DualUNet(num_classes=2, encoder='resnet18');"
            "print(*m(torch.rand(1, 3, 40, 40))[0].shape)")
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                            text=True, check=True)
    assert result.stdout.split() == ["1", "3", "40", "40"]
