"""`genseg export`: what it writes says what the module says, for images of any size and number."""

import gc
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_genseg import GMMSeg, GSSInverse, SoftmaxSegmenter
from lightning_genseg.cli.export import export
from lightning_genseg.data import SyntheticScenes
from lightning_genseg.data.episodes.support import SupportFolder
from lightning_genseg.errors import GenSegError
from lightning_genseg.methods.deploy import Deployable, load_method
from lightning_genseg.methods.fewshot.support import Support
from lightning_genseg.ops.inference_options import plain_options
from lightning_genseg.uncertainty.conformal import Threshold
from tests.contract import TINY, in_groups, save
from tests.methods.agmm.test_module import make as agmm
from tests.methods.fewshot.test_base import make as prototypes
from tests.methods.fewshot.test_base_learner import TestBaseLearner as _BaseLearner
from tests.methods.fewshot.test_cgmgm import BAM
from tests.methods.fewshot.test_cgmgm import make as cgmgm
from tests.methods.gss.test_module import make as gss

ROOT = Path(__file__).parents[2]
SIZES = [(1, 64, 64), (3, 40, 52), (2, 97, 61)]


@pytest.fixture
def photographs():
    """Real ones where there are some, else drawn ones; by number, height and width."""
    folder = Path(os.environ.get("GENSEG_SHARED", ROOT.parent / "shared"))
    files = sorted((folder / "data" / "msrc_v2" / "images").glob("*.jpg"))[:3]
    if files:
        pictures = [Image.open(file).convert("RGB").resize((110, 110)) for file in files]
        images = torch.stack([torch.from_numpy(np.array(p)) for p in pictures])
        images = images.movedim(-1, 1) / 255
    else:
        scenes = SyntheticScenes(3, (110, 110), seed=0)
        images = torch.stack([scenes[i]["image"] for i in range(3)])
    return lambda number, height, width: images[:number, :, :height, :width]


def calibrated(**arguments):
    """A GMMSeg whose threshold half the pixels exceed."""
    model = GMMSeg(**{**TINY, **in_groups(memory_size=50), **arguments}).eval()
    with torch.no_grad():
        middle = float(model.maps(torch.rand(1, 3, 64, 64))["anomaly"].median())
    model.anomaly.inference = plain_options(model.inference)
    model.anomaly.thresholds = {"density": Threshold(middle, 0.05, "image", 0.1, 19)}
    return model


def randomize_norms(model):
    """Statistics that are not those of a fresh network, as after a training."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)


def inverse(tmp_path):
    return GSSInverse(6, save(gss(), tmp_path / "prior.ckpt"), width=8)


DENSE = {
    "GMMSeg": lambda _: calibrated(),
    "own_images": lambda _: calibrated(inference={"short_side": 50, "margin": 10}),
    "sizes": lambda _: calibrated(inference={"short_side": 40, "long_side": 50, "multiple": 16}),
    "tensorflow": lambda _: calibrated(  # whose padding goes by the size
        encoder="tu-tf_mobilenetv3_small_minimal_100",
        inference={"short_side": 50, "margin": 10},
        network_options={"decoder_segmentation_channels": 16},
    ),
    "softmax": lambda _: SoftmaxSegmenter(**TINY, anomaly_score="energy"),
    "AGMM": lambda _: agmm(anomaly_score="msp"),
    "GSS": lambda _: gss(),
    "GSSInverse": inverse,
    "BaseLearner": lambda _: _BaseLearner().make(),
    "pspnet": lambda _: GMMSeg(6, encoder="resnet18", decoder="pspnet"),
    "upernet": lambda _: GMMSeg(6, encoder="resnet18", decoder="upernet"),
    "deeplabv3plus": lambda _: GMMSeg(6, encoder="resnet18", decoder="deeplabv3plus"),
    "ocrnet": lambda _: SoftmaxSegmenter(6, encoder="resnet18", decoder="ocrnet"),
    "pan": lambda _: SoftmaxSegmenter(6, encoder="resnet18", decoder="pan"),
}
FEW_SHOT = {
    "CosinePrototypes": prototypes,
    "CGMGM": cgmgm,
    "BAM": lambda: cgmgm(**BAM),
}


def run_onnx(path):
    """A function from images to outputs by name, as strangers have it."""
    session = pytest.importorskip("onnxruntime").InferenceSession(str(path))
    names = [output.name for output in session.get_outputs()]
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    return lambda image: dict(zip(names, session.run(None, {"image": image.numpy()}), strict=True))


def run_torch(path):
    graph = torch.export.load(path).module()
    return lambda image: {name: x.numpy() for name, x in graph(image).items()}


@torch.no_grad()
def assert_same(run, model, photographs):
    model.eval()
    for size in SIZES:
        image = photographs(*size)
        found, maps = run(image), model.predict_maps(image)
        expected = model._prediction(maps)
        expected["probabilities"] = maps["scores"].softmax(1)
        assert found.keys() == expected.keys()
        for name in ("probabilities", "anomaly"):
            if name in found:
                np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-4)
        for name in ("mask", "anomaly_mask"):
            if name in found:
                assert (found[name] == expected[name].numpy()).mean() > 0.999
                assert found[name].shape == (size[0], *size[1:])


@pytest.fixture
def support(tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / "object" / kind).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        picture = rng.integers(128, size=(60, 80, 3), dtype=np.uint8)
        picture[20:50, 20:60, 0] += 127
        Image.fromarray(picture).save(tmp_path / "object" / "images" / name)
        mask = np.zeros((60, 80), np.uint8)
        mask[20:50, 20:60] = 1
        Image.fromarray(mask).save(tmp_path / "object" / "masks" / name)
    return tmp_path / "object"


@pytest.mark.parametrize("decoder", ["fpn", "deeplabv3plus"])
def test_fixed_padding_is_that_of_tensorflow(decoder):
    """On sizes that are multiples of the stride, as the encoder sees them."""
    names = ["tu-tf_efficientnet_lite0", "tu-tf_mobilenetv3_small_minimal_100"]
    for name in names[: 1 if decoder == "deeplabv3plus" else 2]:
        model = SoftmaxSegmenter(3, encoder=name, decoder=decoder).eval()
        graph = Deployable(model)
        same = [m for m in graph.model.modules() if type(m).__name__ == "_SamePadded"]
        assert len(same) >= 3
        for size in ((50, 70), (33, 96)):
            image = torch.rand(1, 3, *size)
            with torch.no_grad():
                expected = model.maps(image)["scores"].softmax(1)
                torch.testing.assert_close(graph(image)["probabilities"], expected)


def test_the_graph_before_it_is_one(photographs):
    """What is traced says what the module says; the module stays as it was."""
    model = calibrated(decoder="pspnet", network_options=None)
    before = [type(module) for module in model.modules()]
    graph = Deployable(model)
    assert_same(lambda image: {k: x.numpy() for k, x in graph(image).items()}, model, photographs)
    assert [type(module) for module in model.modules()] == before


@pytest.mark.slow
def test_torch_export(genseg, tmp_path, photographs, capsys):
    model = calibrated()
    save(model, tmp_path / "last.ckpt")
    genseg("export --ckpt_path last.ckpt --format torch_export")
    assert "The model is in last.pt2" in capsys.readouterr().out
    assert_same(run_torch("last.pt2"), model, photographs)


def test_pretrained(genseg, tmp_path):
    model = save(calibrated(), tmp_path / "last.ckpt")
    genseg("export --ckpt_path last.ckpt --format pretrained --output shared")
    loaded, image = load_method(tmp_path / "shared"), torch.rand(1, 3, 40, 50)
    assert torch.equal(loaded(image), load_method(model)(image))


def test_a_folder_has_the_score_and_nothing_that_it_cannot_keep(genseg, fails, tmp_path):
    save(calibrated(), tmp_path / "last.ckpt")
    line = "export --ckpt_path last.ckpt --format pretrained --output"
    genseg(f"{line} shared --anomaly_score energy")
    assert load_method(tmp_path / "shared").anomaly_score == "energy"
    for option in ("whole_image true", "support_root photos"):
        sentence = f"a folder for from_pretrained keeps no {option.split()[0]}"
        assert sentence in fails(f"{line} other --{option}")
    assert not (tmp_path / "other").exists()
    assert "are of the files in support_root" in fails(f"{line} other --support_size 65")


def test_a_method_of_ones_own(genseg, fails, tmp_path, monkeypatch):
    """Is imported where the command says so, and not because a checkpoint does."""
    source = "from lightning_genseg import GMMSeg\n\nclass Mine(GMMSeg):\n    'My own.'\n"
    (tmp_path / "own_method.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    kind = importlib.import_module("own_method").Mine
    save(kind(**TINY), tmp_path / "last.ckpt")
    genseg("export --ckpt_path last.ckpt --format pretrained --method own_method.Mine")
    assert type(load_method(tmp_path / "last-pretrained", kind)) is kind
    line = "export --ckpt_path last.ckpt --format pretrained --output other --method"
    assert "No module named 'no_method'" in fails(f"{line} no_method.Mine")
    save(type("Unknown", (SoftmaxSegmenter,), {})(**TINY), tmp_path / "unknown.ckpt")
    gc.collect()
    sentence = "of a method Unknown, which is not known here: give the import path"
    assert sentence in fails("export --ckpt_path unknown.ckpt")


def test_nothing_is_written_over(fails, tmp_path):
    save(calibrated(), tmp_path / "last.ckpt")
    before = (tmp_path / "last.ckpt").read_bytes()
    for words in ("--format torch_export", "--format pretrained", ""):
        assert "exists" in fails(f"export --ckpt_path last.ckpt --output last.ckpt {words}")
    assert (tmp_path / "last.ckpt").read_bytes() == before


def test_after_a_fit(genseg, checkpoint, tmp_path):
    """The card of a model that the command has trained has data, scores and the command."""
    genseg(f"export --ckpt_path {checkpoint} --format pretrained --output shared")
    card = (tmp_path / "shared" / "README.md").read_text()
    assert "genseg fit --config config.yaml" in card
    assert "SyntheticScenesDataModule" in card
    assert "| val | mIoU | 0." in card


@pytest.mark.parametrize(
    ("make", "score", "sentence"),
    [
        (gss, "energy", "which is the same for every pixel with GSS"),
        (lambda: SoftmaxSegmenter(**TINY), "density", "SoftmaxSegmenter has no class densities"),
        (FEW_SHOT["CosinePrototypes"], "msp", "CosinePrototypes takes no anomaly_score"),
    ],
    ids=["constant", "none", "few-shot"],
)
def test_a_score_that_a_model_cannot_have(make, score, sentence, tmp_path):
    with pytest.raises(GenSegError, match=sentence):
        export(save(make(), tmp_path / "model.ckpt"), anomaly_score=score)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "GMMSeg")) for name in DENSE]
)
def test_onnx(name, genseg, tmp_path, photographs):
    pytest.importorskip("onnxscript")
    model = DENSE[name](tmp_path)
    randomize_norms(model)
    save(model, tmp_path / "last.ckpt")
    score = "" if model.anomaly_score is None else f"--anomaly_score {model.anomaly_score}"
    genseg(f"export --ckpt_path last.ckpt {score}")
    assert_same(run_onnx("last.onnx"), model, photographs)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", FEW_SHOT)
def test_few_shot(name, genseg, tmp_path, support, photographs):
    pytest.importorskip("onnxscript")
    model = FEW_SHOT[name]()
    save(model, tmp_path / "last.ckpt")
    genseg("export --ckpt_path last.ckpt --support_root object --support_size 65")
    model.support = Support(*SupportFolder(support, 65).read().values())
    assert_same(run_onnx("last.onnx"), model, photographs)


@pytest.mark.slow
def test_the_lines_of_the_documentation(genseg, tmp_path, photographs):
    """They run in a process that cannot import this package or PyTorch."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model = calibrated(class_names=list(SyntheticScenes.CLASS_NAMES))
    save(model, tmp_path / "last.ckpt")
    genseg("export --ckpt_path last.ckpt --format onnx --output model.onnx")
    picture = (photographs(1, 60, 90)[0].movedim(0, -1).numpy() * 255).astype(np.uint8)
    Image.fromarray(picture).save("photo.png")
    shutil.move("photo.png", "photo.jpg")  # without JPEG's loss
    page = (ROOT / "docs" / "deploy.md").read_text()
    block = next(
        part for part in page.split("```python\n") if "onnxruntime" in part.split("```")[0]
    )
    lines = block.split("```")[0]
    lines = lines.removeprefix("python\n")
    hide = "import sys; sys.modules['torch'] = sys.modules['lightning_genseg'] = None\n"
    done = subprocess.run([sys.executable, "-c", hide + lines], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = model.predict_image(picture)["mask"]
    assert (np.array(Image.open("mask.png")) == expected).mean() > 0.999
    assert model.class_names[expected[0, 0]] in done.stdout


@pytest.mark.parametrize(
    ("make", "options", "sentence"),
    [
        (lambda: calibrated(inference={"flip": True}), "", "set whole_image to true"),
        (prototypes, "", "give support_root"),
        (calibrated, "--support_root x", "support_root is for few-shot models"),
        (lambda: GMMSeg(**TINY, **in_groups(covariance="full")), "", "no mixture.covariance full"),
        (calibrated, "--anomaly_score sml", "run `genseg calibrate"),
    ],
)
def test_what_no_graph_holds(make, options, sentence, fails, tmp_path):
    save(make(), tmp_path / "last.ckpt")
    assert sentence in fails(f"export --ckpt_path last.ckpt {options}")


def test_thresholds_of_other_predictions_are_left_out():
    model = calibrated(inference={"flip": True})
    found = Deployable(model, whole_image=True)(torch.rand(1, 3, 40, 50))
    assert set(found) == {"mask", "probabilities", "anomaly"}
    assert model.inference == model.anomaly.inference == {"flip": True}


def test_no_checkpoint(fails, tmp_path):
    assert "ckpt_path 'no.ckpt' does not exist" in fails("export --ckpt_path no.ckpt")
    (tmp_path / "no.ckpt").write_bytes(b"nothing")
    assert "is not a checkpoint" in fails("export --ckpt_path no.ckpt")
