"""Generated inputs over all commands: each ends in a result, a sentence or a documented refusal."""

import io
import json
import random
import shutil
import warnings

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lightning_genseg.callbacks import read_manifest
from lightning_genseg.cli.main import main
from tests.cli.conftest import CONFIG

pytestmark = pytest.mark.slow
PARTS, EACH = 12, 30  # 360 inputs

# Nothing that leads out of the folder or starts many processes.
VALUES = """
    0 -1 1 2 300 1e400 -1e400 nan inf -inf 0.5 1e-320 99999999999999999999 true false null none
    '' [] {} [1,2] [0,0] [[1]] {0:0,255:1} {a:b} {1} ä 日本 x/../y . \\x00 --x @ % * {a: [1, b: 2
    lightning.pytorch.Trainer torch.nn.Linear os.system !!python/name:os.system &a [*a 2026-01-01
    12:30 0x10 1_000
""".split()  # noqa: SIM905
OPTIONS = """
    data.num_classes data.batch_size data.eval_batch_size data.crop_size data.seed data.val_fraction
    data.ids data.class_names data.palette data.unknown_classes data.train_list data.val_list
    data.masks data.images data.root data.sparse data.train_transform data.eval_transform
    data.class_balanced data.on_error data.absent_classes data.predict_root data.cache_dir
    model.encoder model.decoder model.encoder_weights model.inference.window model.inference.scales
    model.inference model.mean model.std model.anomaly_score model.optimizer model.optimizer.lr
    model.lr_scheduler model.network_options model.class_names model.ignore_index
    trainer.max_epochs trainer.max_steps trainer.precision trainer.accumulate_grad_batches
    trainer.limit_train_batches trainer.val_check_interval trainer.callbacks trainer.logger
    report.num_pictures predictions.output_dir predictions.alpha predictions.on_error ckpt_path
    seed_everything config
""".split()  # noqa: SIM905
MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F", "I;16"]


class Inputs:
    """Draws the inputs of one seed into a folder of its own."""

    def __init__(self, seed, folder, checkpoint):
        self.random = random.Random(seed)
        self.folder, self.checkpoint = folder, checkpoint
        self.good = set()  # names of pictures that nothing was done to
        for index in range(4):
            mask = np.zeros((16, 16), np.uint8)
            mask[:, 4 + 2 * index :] = 1
            image = np.full((16, 16, 3), 60 * index, np.uint8)
            for kind, array in (("images", image), ("masks", mask)):
                (folder / "photos" / kind).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(folder / "photos" / kind / f"{index}.png")
            self.good.add(str(index))
        self.init = {"root": "photos", "num_classes": 2, "batch_size": 2, "num_workers": 0}
        self.init |= {"crop_size": [16, 16], "cache_dir": "cache", "predict_root": "photos/images"}

    def write_config(self):
        data = {"class_path": "FolderDataModule", "init_args": self.init}
        trainer = {**CONFIG["trainer"], "max_steps": 1, "limit_val_batches": 1}
        content = {**CONFIG, "trainer": trainer, "data": data}
        (self.folder / "own.yaml").write_text(yaml.safe_dump(content))

    def damaged(self, content):
        """Bytes cut, turned, repeated or replaced."""
        content = bytearray(content)
        kind = self.random.randrange(5)
        place = self.random.randrange(max(1, len(content)))
        if kind == 0:
            return bytes(content[:place])
        if kind == 1:
            return self.random.randbytes(self.random.randrange(200))
        if kind == 2:
            return bytes(content[:place] + content[max(0, place - 40) :])
        for _ in range(self.random.choice([1, 20])):
            if content:
                content[self.random.randrange(len(content))] = self.random.randrange(256)
        return bytes(content)

    def picture(self, mode, size):
        array = np.random.default_rng(self.random.randrange(99)).integers(
            0, 3, (*size, 4), np.uint8
        )
        image = Image.fromarray(array, "RGBA").convert("RGB")
        if mode == "I;16":
            return Image.fromarray(array[..., 0].astype(np.uint16))
        return image.convert("L").convert(mode) if mode in "1IF" else image.convert(mode)

    def picture_file(self, kind):
        """One picture or mask of the folder becomes another."""
        name = str(self.random.randrange(4))
        path = self.folder / "photos" / kind / f"{name}.png"
        if self.random.random() < 0.5:
            path.write_bytes(self.damaged(path.read_bytes()))
        else:
            size = self.random.choice([(16, 16), (1, 1), (16, 17), (3, 90)])
            suffix = self.random.choice(["png", "tif", "jpg", "bmp", "webp", "gif"])
            try:
                content = io.BytesIO()
                options = {"format": {"tif": "TIFF", "jpg": "JPEG"}.get(suffix, suffix.upper())}
                self.picture(self.random.choice(MODES), size).save(content, **options)
            except (OSError, ValueError, KeyError):  # not every format has every mode
                content = io.BytesIO(b"")
            if self.random.random() < 0.8:
                path.unlink()
            path.with_suffix(f".{suffix}").write_bytes(content.getvalue())
        if kind == "images":
            self.good.discard(name)

    def options(self):
        words = []
        for _ in range(self.random.choice([1, 1, 2])):
            words += [f"--{self.random.choice(OPTIONS)}", self.random.choice(VALUES).strip("'")]
        return words

    def text_file(self):
        """A list, points, scribbles or a configuration with something wrong in it."""
        kind = self.random.choice(["list", "points", "xml", "config"])
        if kind == "list":
            (self.folder / "list").write_bytes(self.damaged(b"0\n1\n2.png\nphotos/3\n"))
            self.init |= {"train_list": "list", "val_list": "list"}
        elif kind == "points":
            point = {"x": 1, "y": 2, "cls": 1}
            key = self.random.choice(list(point))
            point[key] = self.random.choice([None, "a", [], 1e400, -5, 10**400, True, {}])
            content = {str(index): [{"x": 3, "y": 3, "cls": 0}, point] for index in range(4)}
            text = json.dumps(content).encode()
            bad = self.damaged(text) if self.random.random() < 0.5 else text
            (self.folder / "points.json").write_bytes(bad)
            init = {"files": "points.json"}
            self.init["sparse"] = {"class_path": "PointFiles", "init_args": init}
        elif kind == "xml":
            (self.folder / "xml").mkdir(exist_ok=True)
            text = (
                b"<annotation><size><width>16</width><height>16</height></size><polygon><tag>"
                b"class_1</tag><point><X>1</X><Y>2</Y></point></polygon></annotation>"
            )
            for index in range(4):
                (self.folder / "xml" / f"{index}.xml").write_bytes(self.damaged(text))
            self.init["sparse"] = {"class_path": "ScribbleFiles", "init_args": {"folder": "xml"}}
        self.write_config()
        if kind == "config":
            path = self.folder / "own.yaml"
            path.write_bytes(self.damaged(path.read_bytes()))

    def draw(self):
        """Words of a command line."""
        what = self.random.choice(["images", "masks", "options", "options", "text", "checkpoint"])
        command = self.random.choice(["fit", "check", "test", "predict", "validate", "calibrate"])
        checkpoint, extra = self.checkpoint, []
        if self.random.random() < 0.2:
            self.init["on_error"] = "skip"
        if what in ("images", "masks"):
            self.picture_file(what)
            command = self.random.choice(["fit", "check", "predict", "predict"])
        if what == "text":
            self.text_file()
            command = self.random.choice(["fit", "check", "reconstruct"])
        else:
            self.write_config()
        if what == "options":
            extra = self.options()
        if what == "checkpoint":
            checkpoint = self.folder / "bad.ckpt"
            checkpoint.write_bytes(self.damaged(self.checkpoint.read_bytes()))
            command = self.random.choice(["test", "predict", "validate", "calibrate", "fit"])
        words = [command, "--config", "own.yaml"]
        if command == "fit":  # a configuration cut short would train for a thousand epochs
            words += ["--trainer.max_steps", "1"]
        if command in ("test", "predict", "validate", "calibrate") or what == "checkpoint":
            words += ["--ckpt_path", str(checkpoint)]
        if command == "predict":
            words += ["--predictions.output_dir", "out"]
        return what, [*words, *extra]


def outcome(words, capsys):
    """What a command line ends in; None where it is a traceback."""
    capsys.readouterr()
    try:
        main(words)
    except SystemExit as exit:
        if exit.code in (0, None):
            return "result"
        lines = capsys.readouterr().err.strip().splitlines()
        if exit.code == 2 and lines and lines[-1].startswith("genseg: error: "):
            return "sentence"
        named = any("were not predicted" in line for line in lines)
        return "pictures named" if exit.code == 1 and named else None
    return "result"


@pytest.fixture(scope="module")
def two_classes(tmp_path_factory):
    """A checkpoint of two classes, and what it predicts where nothing is wrong."""
    folder = tmp_path_factory.mktemp("control")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.chdir(folder)
        inputs = Inputs(0, folder, None)
        inputs.write_config()
        main(["fit", "--config", "own.yaml"])
        (checkpoint,) = folder.rglob("last.ckpt")
        words = ["predict", "--config", "own.yaml", "--ckpt_path", str(checkpoint)]
        main([*words, "--predictions.output_dir", "out"])
    return checkpoint, masks(folder / "out")


def masks(folder):
    found = {}
    for line in read_manifest(folder / "predictions.jsonl"):
        if line["mask"]:
            with Image.open(folder / line["mask"]) as mask:
                found[line["name"]] = np.array(mask)
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(PARTS))
def test_generated_inputs_end_in_results_or_sentences(
    two_classes, part, tmp_path, monkeypatch, capsys
):
    checkpoint, control = two_classes
    wrong, counts = [], {}
    for seed in range(part * EACH, (part + 1) * EACH):
        folder = tmp_path / str(seed)
        folder.mkdir()
        monkeypatch.chdir(folder)
        inputs = Inputs(seed, folder, checkpoint)
        what, words = inputs.draw()
        torch.manual_seed(0)
        try:
            ended = outcome(words, capsys)
        except BaseException as error:  # a traceback is what is looked for
            ended, words = None, [*words, repr(error)[:300]]
        counts[ended] = counts.get(ended, 0) + 1
        if ended is None:
            wrong.append(f"{seed}: {what}: {' '.join(words)}")
        elif words[0] == "predict" and what == "images" and (folder / "out").is_dir():
            found = masks(folder / "out")
            assert inputs.good <= found.keys()
            assert all(np.array_equal(found[name], control[name]) for name in inputs.good)
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(folder)
    print(counts)
    assert not wrong, "\n".join(wrong)
