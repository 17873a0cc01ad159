"""Features of every decoder, options, weights from files, networks of one's own."""

import math

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from lightning_genseg.errors import DownloadError, GenSegError, MissingFileError
from lightning_genseg.networks import DECODERS, PixelFeatures
from lightning_genseg.networks.features import feature_channels
from lightning_genseg.networks.weights import load_weights
from tests.contract import copied

ENCODER = "tu-test_resnet"
# Decoders that stay coarser than stride 4.
STRIDES = {"pspnet": 8, "deeplabv3": 8, "fcn": 8, "hypercolumns": 8}


def has_finite_gradients(module):
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    return bool(gradients) and all(bool(g.isfinite().all()) for g in gradients)


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_decoder_keeps_its_promise_on_an_odd_size(decoder):
    features = PixelFeatures(ENCODER, decoder, num_classes=5)
    assert features.stride == STRIDES.get(decoder, 4)
    assert features.auxiliary_weight == {"ocrnet": 0.4, "mla": 0.25}.get(decoder, 0.0)
    assert features.training
    output = features(torch.randn(2, 3, 67, 93))
    rows, columns = math.ceil(67 / features.stride), math.ceil(93 / features.stride)
    assert output.shape == (2, features.out_channels, rows, columns)
    assert output.isfinite().all()
    output.square().mean().backward()
    assert has_finite_gradients(features.encoder)
    assert has_finite_gradients(features.decoder) or decoder == "hypercolumns"


def test_the_names_of_the_decoders():
    names = "unet unetplusplus manet linknet fpn pspnet pan deeplabv3 deeplabv3plus upernet"
    assert " ".join(DECODERS) == f"{names} segformer deeplabv3plus_full fcn ocrnet mla hypercolumns"


@pytest.mark.parametrize("size", [(1, 1), (32, 64), (31, 129)])
def test_any_image_size(size):
    features = PixelFeatures(ENCODER, "pan").eval()
    output = features(torch.randn(1, 3, *size))
    assert output.shape == (1, 32, math.ceil(size[0] / 4), math.ceil(size[1] / 4))


def test_padding_is_at_the_bottom_right_with_zeros():
    features = PixelFeatures(ENCODER, "fpn").eval()
    image = torch.randn(1, 3, 50, 40)
    padded = torch.zeros(1, 3, 64, 64)
    padded[..., :50, :40] = image
    torch.testing.assert_close(features(image), features(padded)[..., :13, :10])


def test_features_are_what_smp_puts_under_its_classifier():
    import segmentation_models_pytorch as smp

    features = PixelFeatures(ENCODER, "fpn").eval()
    model = smp.FPN(ENCODER, encoder_weights=None, classes=3).eval()
    model.encoder.load_state_dict(features.encoder.state_dict())
    model.decoder.load_state_dict(features.decoder.state_dict())
    image = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(model.segmentation_head(features(image)), model(image))


def test_fine_decoders_are_average_pooled_to_stride_4():
    features = PixelFeatures(ENCODER, "unet").eval()
    image = torch.randn(1, 3, 64, 64)
    full = features.decoder(features.encoder(image))
    assert full.shape[-1] == 64
    expected = full.unflatten(2, (16, 4)).unflatten(4, (16, 4)).mean(dim=(3, 5))
    torch.testing.assert_close(features(image), expected)


@pytest.mark.parametrize("decoder", ["fpn", "segformer", "fcn", "ocrnet"])
def test_bf16_autocast(decoder):
    features = PixelFeatures(ENCODER, decoder, num_classes=5)
    with torch.autocast("cpu", torch.bfloat16):
        output, auxiliary = features.extract(torch.randn(2, 3, 40, 50))
    assert output.isfinite().all()
    assert (auxiliary is None) == (decoder != "ocrnet")
    scores = output if auxiliary is None else auxiliary
    (output.float().square().mean() + scores.float().square().mean()).backward()
    assert has_finite_gradients(features)


def test_options_reach_the_decoder_and_timm():
    options = {"decoder_pyramid_channels": 64, "decoder_segmentation_channels": 32}
    assert PixelFeatures("mobilenet_v2", "fpn", options=options).out_channels == 32
    options = {"encoder_depth": 4, "decoder_channels": [32, 16, 8, 8]}
    assert PixelFeatures(ENCODER, "unet", options=options)(torch.rand(2, 3, 20, 20)).shape[1] == 8
    with_drop = PixelFeatures("tu-test_convnext", "segformer", options={"drop_path_rate": 0.5})
    assert any("DropPath" in type(m).__name__ for m in with_drop.encoder.modules())


@pytest.mark.slow
def test_swin_needs_to_know_its_image_size():
    name = "tu-swin_tiny_patch4_window7_224"
    strict = PixelFeatures(name, "upernet", options={"img_size": [64, 96]}).eval()
    assert strict(torch.rand(1, 3, 60, 90)).shape == (1, 256, 15, 23)
    with pytest.raises(GenSegError, match=r"exactly 64 x 96 pixels and got 100 x 90.*img_size"):
        strict(torch.rand(1, 3, 100, 90))
    free = PixelFeatures(name, "upernet", options={"img_size": 64, "strict_img_size": False}).eval()
    assert free(torch.rand(1, 3, 100, 70)).shape == (1, 256, 25, 18)


@pytest.mark.parametrize(
    ("encoder", "decoder", "options", "message"),
    [
        ("resnet51", "fpn", {}, "encoder 'resnet51' is no .*; did you mean resnet50"),
        ("tu-convnxt_tiny", "fpn", {}, "did you mean tu-convnext_tiny"),
        ("convnext_tiny", "fpn", {}, "write 'tu-convnext_tiny'"),
        ("resnet18", "deeplabv4", {}, "decoder 'deeplabv4' is unknown; did you mean deeplabv3"),
        ("vgg11", "deeplabv3plus", {}, "'deeplabv3plus' needs an encoder .* 'vgg11' cannot"),
        ("vgg11", "fcn", {}, "or set the option encoder_output_stride to 32"),
        ("tu-test_vit", "segformer", {}, "segformer on tu-test_vit cannot be built"),
        ("mit_b0", "linknet", {}, "linknet on mit_b0 cannot be built"),
        ("resnet18", "ocrnet", {}, "ocrnet.*give it num_classes"),
        (ENCODER, "fcn", {"dropout": 1.5}, "dropout is 1.5; it must be at least 0 and less than 1"),
        (ENCODER, "fcn", {"decoder_channels": 0}, "decoder_channels is 0; it must be at least 1"),
        (ENCODER, "fpn", {"decoder_pyramid_chanels": 8}, "'decoder_pyramid_chanels'.*did you mean"),
        ("resnet18", "fpn", {"img_size": 64}, "option 'img_size' is not one of fpn on resnet18"),
        (ENCODER, "fpn", {"classes": 3}, "option 'classes' is not one of fpn"),
        (ENCODER, "fcn", {"widht": 3}, "option 'widht'.*; known are decoder_channels"),
        (ENCODER, "fpn", {"decoder_segmentation_channels": 30}, "cannot be built .*groups"),
    ],
)
def test_what_cannot_work_is_said_in_a_sentence(encoder, decoder, options, message):
    with pytest.raises(GenSegError, match=message) as caught:
        PixelFeatures(encoder, decoder, options=options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("decoder", ["deeplabv3", "deeplabv3plus", "upernet", "pan"])
def test_a_batch_of_one_cannot_be_normalised(decoder):
    features = PixelFeatures(ENCODER, decoder)
    with pytest.raises(GenSegError, match=f"{decoder} on {ENCODER}.*batch size of at least 2"):
        features(torch.rand(1, 3, 64, 64))
    features.decoder.eval()  # frozen statistics are fine
    assert features(torch.rand(1, 3, 64, 64)).isfinite().all()


# Weights


def test_real_imagenet_weights(shared_dir):
    path = shared_dir / "weights" / "mobilenet_v2_imagenet_from_tflite.pth"
    state = torch.load(path, weights_only=True)
    features = PixelFeatures("mobilenet_v2", "fpn", encoder_weights=path)
    loaded = features.encoder.state_dict()
    assert len(loaded) == len(state) - 2  # the classifier's weight and bias
    for key, value in loaded.items():
        torch.testing.assert_close(value, state[key])
    first = r"does not fit resnet18: of its 120 tensors \d+ missing \(conv1.weight, .*, \.\.\.\)"
    with pytest.raises(GenSegError, match=first + r"; 31\d unexpected \(features\.0\.0\.weight, "):
        PixelFeatures("resnet18", "fpn", encoder_weights=str(path))


@pytest.mark.parametrize(
    ("prefix", "wrap"),
    [
        ("", None),
        ("encoder.", None),
        ("features.encoder.", "state_dict"),
        ("module.backbone.", "model"),
    ],
)
def test_encoder_weights_from_other_checkpoints(tmp_path, prefix, wrap):
    source = PixelFeatures("mobilenet_v2", "segformer")
    state = {f"{prefix}{key}": value for key, value in source.encoder.state_dict().items()}
    if prefix:
        state |= {f"decoder.{key}": value for key, value in source.decoder.state_dict().items()}
    torch.save({wrap: state, "epoch": 3} if wrap else state, tmp_path / "run.ckpt")
    target = PixelFeatures("mobilenet_v2", "fpn", encoder_weights=tmp_path / "run.ckpt")
    image = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(target.encoder.eval()(image), source.encoder.eval()(image))


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet"])
def test_a_timm_classifier_fits_its_tu_encoder(tmp_path, name):
    classifier = timm.create_model(name, num_classes=7).eval()
    safetensors.torch.save_file(classifier.state_dict(), tmp_path / "timm.safetensors")
    path = tmp_path / "timm.safetensors"
    features = PixelFeatures(f"tu-{name}", "fpn", encoder_weights=path).eval()
    image = torch.randn(1, 3, 64, 64)
    expected = classifier.forward_intermediates(image, intermediates_only=True)[-1]
    torch.testing.assert_close(features.encoder(image)[-1], expected)


def test_weights_that_do_not_fit_are_counted(tmp_path):
    encoder = PixelFeatures(ENCODER, "fpn").encoder
    state = encoder.state_dict()
    first, second, *_ = state
    shape = tuple(state[second].shape)
    missing = dict(list(state.items())[1:])
    missing[second] = torch.zeros(3, 3)
    missing["extra.weight"] = torch.zeros(1)
    torch.save(missing, tmp_path / "bad.pth")
    before = copied(encoder)
    with pytest.raises(GenSegError, match=r"bad\.pth' does not fit") as caught:
        load_weights(encoder, tmp_path / "bad.pth")
    message = str(caught.value)
    assert f"1 missing ({first})" in message
    assert "1 unexpected (extra.weight)" in message
    assert f"1 of another shape ({second} (3, 3) instead of {shape})" in message
    assert "\n" not in message
    for key, value in encoder.state_dict().items():  # nothing was half loaded
        torch.testing.assert_close(value, before[key])


def test_load_weights_takes_one_part_of_a_checkpoint(tmp_path):
    source, target = (PixelFeatures(ENCODER, "fpn").eval() for _ in range(2))
    state = {f"features.{key}": value for key, value in source.state_dict().items()}
    torch.save({"state_dict": {**state, "head.weight": torch.ones(2)}}, tmp_path / "last.ckpt")
    image = torch.randn(1, 3, 32, 32)
    assert not torch.allclose(target(image), source(image))
    load_weights(target, tmp_path / "last.ckpt", prefix="features.")
    torch.testing.assert_close(target(image), source(image))
    with pytest.raises(GenSegError, match=r"no key that begins with 'net\.'.*features, head"):
        load_weights(target, tmp_path / "last.ckpt", prefix="net.")
    other = PixelFeatures(ENCODER, "segformer")
    with pytest.raises(GenSegError, match=r"\d+ missing \(decoder\..*\d+ unexpected \(decoder\."):
        load_weights(other, tmp_path / "last.ckpt", prefix="features.")


def test_files_that_are_no_weights(tmp_path):
    torch.save(nn.Linear(1, 1), tmp_path / "whole.pth")  # a pickled module would have to run code
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:200])
    (tmp_path / "text.pth").write_text("not weights")
    (tmp_path / "text.safetensors").write_text("not weights")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    for name, sentence in {
        "whole.pth": "holds objects .torch.nn.modules.linear.Linear., not only tensors",
        "cut.pth": "is truncated",
        "text.pth": "is not a checkpoint that can be read safely",
        "text.safetensors": "is not a checkpoint that can be read safely",
        "empty.pth": "holds no state dict",
    }.items():
        with pytest.raises(GenSegError, match=f"{name}' {sentence}"):
            PixelFeatures(ENCODER, "fpn", encoder_weights=tmp_path / name)
    with pytest.raises(MissingFileError, match=r"no\.pth' is not a file: give 'imagenet'"):
        PixelFeatures(ENCODER, "fpn", encoder_weights=tmp_path / "no.pth")
    with pytest.raises(MissingFileError, match=r"no\.pth' does not exist"):
        load_weights(nn.Linear(1, 1), tmp_path / "no.pth")


@pytest.mark.parametrize("encoder", ["mobilenet_v2", ENCODER])
def test_a_download_without_network(encoder, tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DownloadError, match=f"'imagenet' of '{encoder}' could not be downloaded"):
        PixelFeatures(encoder, "fpn", encoder_weights="imagenet")


def test_an_encoder_without_published_weights():
    with pytest.raises(GenSegError, match="has no published 'imagenet' weights"):
        PixelFeatures("tu-test_mambaout", "fpn", encoder_weights="imagenet")


# A user's own network


class Own(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.conv = nn.Conv2d(3, 7, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(7)
        self.answer = answer

    def forward(self, image):
        return self.answer(self.norm(self.conv(image)))


def test_feature_channels():
    own = Own(lambda x: x)
    own.conv.eval()
    assert feature_channels(own) == 7
    assert own.training
    assert own.norm.training
    assert not own.conv.training  # every mode as it was
    torch.testing.assert_close(own.norm.running_mean, torch.zeros(7))
    own.out_channels = 9
    assert feature_channels(own) == 9
    assert feature_channels(PixelFeatures(ENCODER, "fpn")) == 128
    assert feature_channels(nn.Identity()) == 3


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: x.mean(dim=(2, 3)), r"Own must map .* gave \(1, 7\)"),
        (lambda x: [x, x], "Own must map .* gave list"),
        (lambda x: x @ x.new_zeros(5, 5), "Own failed on a 1 x 3 x 64 x 64 image"),
    ],
)
def test_a_network_that_gives_no_features(answer, message):
    with pytest.raises(GenSegError, match=message):
        feature_channels(Own(answer))
