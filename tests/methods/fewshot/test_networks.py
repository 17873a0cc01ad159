import pytest
import torch
from torch import nn

from lightning_genseg.errors import GenSegError
from lightning_genseg.methods.fewshot.networks import (
    EncoderStages,
    Ensemble,
    GuidanceResidual,
    GuidedDecoder,
    PyramidPooling,
    ShotWeights,
    gram_distance,
)

close = torch.testing.assert_close


@pytest.mark.parametrize(
    ("encoder", "size", "shapes"),
    [
        ("resnet50", 473, [(512, 60), (1024, 60), (2048, 60)]),
        ("tu-resnet50s", 473, [(512, 60), (1024, 60), (2048, 60)]),
        ("resnet50", 641, [(512, 81), (1024, 81), (2048, 81)]),
        ("vgg16_bn", 473, [(256, 60), (512, 30), (512, 30)]),
        ("vgg16_bn", 641, [(256, 81), (512, 41), (512, 41)]),
        ("mobilenet_v2", 193, [(32, 25), (96, 25), (1280, 25)]),
    ],
)
def test_shapes_of_the_papers(encoder, size, shapes):
    with torch.device("meta"):
        stages = EncoderStages(encoder).eval()
        features = stages(torch.empty(1, 3, size, size))
    assert [tuple(maps.shape) for maps in features] == [(1, c, n, n) for c, n in shapes]
    assert stages.channels == tuple(c for c, _ in shapes)
    low, mid, _ = shapes
    assert features.middle().shape == (1, low[0] + mid[0], mid[1], mid[1])


@pytest.mark.parametrize("name", ["resnet50", "tu-resnet50s"])
def test_resnet_is_dilated_as_in_semseg(name):
    with torch.device("meta"):
        encoder = EncoderStages(name).encoder
    encoder = getattr(encoder, "model", encoder)
    for layer, dilation in ((encoder.layer3, 2), (encoder.layer4, 4)):
        assert {block.conv2.dilation for block in layer} == {(dilation, dilation)}  # also the first
        assert {block.conv2.stride for block in layer} == {(1, 1)}


@pytest.mark.parametrize("encoder", ["resnet18", "mobilenet_v2", "vgg11_bn", "tu-test_resnet"])
def test_the_last_stage_alone(encoder):
    stages = EncoderStages(encoder).eval()
    with torch.no_grad():
        features = stages(torch.rand(1, 3, 65, 65))
        close(stages.last(features.mid), features.high)


@pytest.mark.parametrize(
    ("encoder", "words"),
    [("resnet_50", "did you mean resnet50"), ("densenet121", "set output_stride to 32")],
)
def test_encoders_that_do_not_work(encoder, words):
    with pytest.raises(GenSegError, match=words):
        EncoderStages(encoder)


def test_encoders_that_work_in_part():
    assert EncoderStages("mit_b0", output_stride=32).channels == (64, 160, 256)
    with pytest.raises(GenSegError, match="TimmUniversalEncoder cannot be run apart"):
        EncoderStages("tu-test_efficientnet").last(torch.rand(1, 96, 8, 8))


def test_pyramid():
    pyramid = PyramidPooling(16, 8)
    assert pyramid(torch.rand(2, 16, 9, 11)).shape == (2, 8, 9, 11)
    with pytest.raises(GenSegError, match="batch size of at least 2"):
        pyramid(torch.rand(1, 16, 9, 9))
    assert pyramid.eval()(torch.rand(1, 16, 9, 9)).shape == (1, 8, 9, 9)


def test_number_of_parameters_is_that_of_bam():
    """4.92 M in BAM: two reductions of 1536 to 256 channels, decoder, two merges of two numbers."""
    decoder = sum(p.numel() for p in GuidedDecoder(513).parameters())
    ensemble = sum(p.numel() for p in Ensemble().parameters())
    assert (decoder + ensemble + 2 * 1536 * 256) / 1e6 == pytest.approx(4.92, abs=0.005)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in GuidedDecoder(257).modules())


def test_guidance_residual_starts_as_the_guidance():
    guidance = torch.rand(2, 1, 3, 4)
    scores = GuidanceResidual()(guidance)
    assert torch.equal(scores[:, 1:] > scores[:, :1], guidance > 0.5)
    sure = GuidanceResidual()(torch.ones(1, 1, 1, 1)).softmax(1)[0, 1].item()
    assert sure == pytest.approx(1 / (1 + 2.718281828**-2))


def test_gram_distance():
    features = torch.rand(2, 4, 5, 6, dtype=torch.float64)
    assert gram_distance(features, features).abs().max() < 1e-6
    assert gram_distance(features, 7 * features).abs().max() < 1e-6
    query, support = torch.zeros(1, 2, 1, 2), torch.ones(1, 2, 3, 3)
    query[0, 0, 0, 0] = query[0, 1, 0, 1] = 1  # orthogonal channels against equal ones
    close(gram_distance(query, support), torch.tensor([2**0.5 / 2]), atol=1e-6, rtol=0)


def test_shot_weights():
    weights = ShotWeights(3)
    distances = torch.rand(4, 3)
    result = weights(distances)
    close(result.sum(1), torch.ones(4))
    order = [2, 0, 1]
    close(weights(distances[:, order]), result[:, order])
    assert torch.equal(ShotWeights(1)(distances[:, :1]), torch.ones(4, 1))
    close(weights(torch.rand(1, 5)), torch.full((1, 5), 0.2))


def test_ensemble_starts_as_the_meta_learner():
    meta = torch.rand(2, 2, 3, 3)
    ensemble = Ensemble()
    assert torch.equal(ensemble(meta, torch.rand(2, 1, 3, 3), torch.rand(2)), meta)
    with torch.no_grad():
        ensemble.known.weight[:, 1] = 1
    raised = ensemble(meta, torch.full((2, 1, 3, 3), 0.5), torch.rand(2))
    close(raised[:, 0], meta[:, 0] + 0.5)
    assert torch.equal(raised[:, 1], meta[:, 1])
