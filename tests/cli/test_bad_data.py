"""Data that are wrong in a way that no single file shows, and single files that are bad."""

import json
import warnings

import numpy as np
import pytest
import yaml
from PIL import Image

from lightning_genseg.callbacks import read_manifest
from tests.cli.conftest import CONFIG

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


def write_folder(root, count=6, values=(0, 255), suffix="png", size=(32, 32)):
    """`images` and `masks` whose left half has the first value and right half the second."""
    mask = np.full(size, values[0], np.uint8)
    mask[:, size[1] // 2 :] = values[1]
    for index in range(count):
        image = np.full((*size, 3), 10 * index, np.uint8)
        for folder, array, end in (("images", image, "png"), ("masks", mask, suffix)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(root / folder / f"{index:02}.{end}")
    return root


@pytest.fixture
def own(tmp_path):
    """Configuration of a short training on `photos`; further words go into `data`."""

    def write(**words):
        init = {"root": "photos", "num_classes": 2, "batch_size": 2, "num_workers": 0}
        init |= {"crop_size": [32, 32], "cache_dir": "cache", **words}
        data = {"class_path": "FolderDataModule", "init_args": init}
        path = tmp_path / "own.yaml"
        path.write_text(yaml.safe_dump({**CONFIG, "data": data}))
        return "own.yaml"

    return write


IDS = ["{0: 0, 255: 1}", "{0:0,255:1}", "{0:0, 255:1}", '{"0": 0, "255": 1}']


def test_black_and_white_masks_are_refused_and_the_table_is_offered(own, fails, genseg, tmp_path):
    write_folder(tmp_path / "photos")
    message = fails(f"fit --config {own()}")
    assert "no training mask holds a pixel of class_1: they hold 0, 255" in message
    assert "--data.ids '{0: 0, 255: 1}'" in message
    assert not (tmp_path / "runs").exists() or not list(tmp_path.rglob("last.ckpt"))
    assert "1 problems" in fails(f"check --config {own()}")
    (problem,) = json.loads((tmp_path / "data_check" / "data_check.json").read_text())["problems"]
    assert "--data.ids '{0: 0, 255: 1}'" in problem["problem"]


@pytest.mark.parametrize("ids", IDS)
def test_the_table_of_black_and_white_masks_works_with_and_without_spaces(
    own, genseg, tmp_path, ids
):
    write_folder(tmp_path / "photos")
    genseg(f"check --config {own()} --data.ids '{ids}'")
    report = json.loads((tmp_path / "data_check" / "data_check.json").read_text())
    for split in ("train", "val"):
        classes = report["splits"][split]["classes"]
        assert classes["class_1"]["share"] == 0.5
        assert report["splits"][split]["ignored"] == 0


def test_a_training_on_black_and_white_masks(own, genseg, tmp_path):
    write_folder(tmp_path / "photos")
    genseg(f"fit --config {own()} --data.ids {{0:0,255:1}}")
    (report,) = tmp_path.rglob("val_metrics.json")
    assert json.loads(report.read_text())["IoU"].keys() == {"class_0", "class_1"}


def test_absent_classes_are_warned_of_if_asked_for(own, genseg, tmp_path, capsys):
    write_folder(tmp_path / "photos", values=(0, 1))
    config = own(num_classes=4, absent_classes="warn")
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        genseg(f"fit --config {config}")
    expected = "no training mask holds a pixel of class_2, class_3"
    assert any(expected in str(one.message) for one in record)
    genseg(f"check --config {config}")
    assert "problems" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["jpg", "jp2", "tif"])
def test_masks_compressed_with_loss_are_refused(own, fails, tmp_path, suffix):
    write_folder(tmp_path / "photos", values=(0, 1), suffix="png")
    for path in (tmp_path / "photos" / "masks").iterdir():
        options = {"compression": "jpeg"} if suffix == "tif" else {}
        with Image.open(path) as mask:
            mask.save(path.with_suffix(f".{suffix}"), **options)
        path.unlink()
    for command in ("fit", "check"):
        message = fails(f"{command} --config {own()}")
        if command == "check":
            report = json.loads((tmp_path / "data_check" / "data_check.json").read_text())
            message = report["problems"][0]["problem"]
            assert len(report["problems"]) >= 6
        assert "is compressed with loss" in message
        assert "num_classes" not in message


# --- prediction ------------------------------------------------------------------------------


@pytest.fixture
def album(tmp_path):
    """Two good pictures, three that cannot be read, and two of types that PIL does not know."""
    folder = tmp_path / "album"
    (folder / "raw").mkdir(parents=True)
    for name in ("a.png", "z.jpg"):
        Image.fromarray(np.full((40, 50, 3), 90, np.uint8)).save(folder / name)
    whole = (folder / "a.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.tif").write_text("no picture")
    (folder / "phone.heic").write_bytes(b"ftypheic")
    (folder / "raw" / "camera.CR2").write_bytes(b"II*")
    return folder


def manifest(folder):
    return {line["name"]: line for line in read_manifest(folder / "predictions.jsonl")}


@pytest.mark.parametrize("more", ["", "--data.eval_batch_size 3", "--data.num_workers 1"])
def test_predict_goes_on_past_unreadable_pictures(
    genseg, config, checkpoint, album, tmp_path, capsys, more
):
    words = f"predict --config {config} --ckpt_path {checkpoint} --data.predict_root {album} {more}"
    with pytest.raises(SystemExit) as exit:
        genseg(f"{words} --predictions.output_dir out")
    assert exit.value.code == 1
    told = capsys.readouterr().err
    lines = manifest(tmp_path / "out")
    bad = {"cut", "empty", "text", "phone.heic", "raw/camera.CR2"}
    assert {name for name, line in lines.items() if "error" in line} == bad
    assert {name for name, line in lines.items() if line["mask"]} == {"a", "z"}
    for name in bad:
        assert lines[name]["image"] in lines[name]["error"]
        assert lines[name]["error"] in told
    assert "5 images were not predicted" in told
    # Mended, a resumed run predicts it and leaves the good ones alone.
    Image.new("RGB", (30, 20)).save(album / "cut.png")
    with pytest.raises(SystemExit) as exit:
        genseg(f"{words} --predictions.output_dir out --predictions.resume true")
    assert exit.value.code == 1
    again = manifest(tmp_path / "out")
    assert {name for name, line in again.items() if "error" in line} == bad - {"cut"}
    assert again["a"] == lines["a"]


def test_predict_stops_at_an_unreadable_picture_if_asked_to(fails, config, checkpoint, album):
    words = f"predict --config {config} --ckpt_path {checkpoint} --data.predict_root {album}"
    message = fails(f"{words} --predictions.on_error stop")
    assert "cut.png" in message
    assert "cannot be read" in message


def test_a_folder_of_unsupported_pictures_only(fails, config, checkpoint, album):
    for path in album.glob("*.*"):
        if path.suffix != ".heic":
            path.unlink()
    words = f"predict --config {config} --ckpt_path {checkpoint} --data.predict_root {album}"
    assert "(phone.heic, camera.CR2)" in fails(words)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (8, 8), (32, 32), (33, 1), (1, 70)])
def test_tiny_pictures_are_predicted(genseg, config, checkpoint, tmp_path, size):
    (tmp_path / "album").mkdir()
    Image.new("RGB", size).save(tmp_path / "album" / "tiny.png")
    genseg(
        f"predict --config {config} --ckpt_path {checkpoint} --data.predict_root album "
        "--predictions.output_dir out"
    )
    with Image.open(tmp_path / "out" / "masks" / "tiny.png") as mask:
        assert mask.size == size


# --- files that a user writes ----------------------------------------------------------------

LATIN = "h\u00e4user\n".encode("latin-1")
DEEP = b"[" * 100_000
HUGE = b'{"00": [{"x": ' + b"9" * 5000 + b', "y": 1, "cls": 1}]}'


@pytest.mark.parametrize("content", [LATIN, b"\xff\xfe0\x000\x00"])
def test_lists_in_other_encodings_are_named(own, fails, tmp_path, content):
    write_folder(tmp_path / "photos", values=(0, 1))
    (tmp_path / "list.txt").write_bytes(content)
    config = own(train_list="list.txt", val_list="list.txt")
    assert "'list.txt' is not in UTF-8" in fails(f"fit --config {config}")
    fails(f"check --config {config}")
    report = json.loads((tmp_path / "data_check" / "data_check.json").read_text())
    assert "'list.txt' is not in UTF-8" in report["problems"][0]["problem"]


@pytest.mark.parametrize(
    "content",
    [b"trainer: \xe4\xff", DEEP, b"a: [1", b"a: *", b"\x00", b"- 1", b"!!python/name:os.system"],
)
@pytest.mark.parametrize("command", ["fit", "check"])
def test_configurations_that_are_no_yaml_are_told(fails, tmp_path, content, command):
    (tmp_path / "bad.yaml").write_bytes(content)
    assert len(fails(f"{command} --config bad.yaml")) < 2000


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (LATIN, "not in UTF-8"),
        (DEEP, "recursion"),
        (HUGE, "digits"),
        (b'{"00": [{"x": 1e400, "y": 1, "cls": 1}]}', "lies outside"),
        (b'{"00": [{"x": 1' + b"0" * 400 + b', "y": 1, "cls": 1}]}', "is no point"),
        (b'{"00": [{"x": NaN, "y": 1, "cls": 1}]}', "lies outside"),
        (b"[1, 2]", "must hold a list of points"),
    ],
    ids=["latin", "deep", "huge", "infinite", "large", "nan", "list"],
)
def test_bad_json_is_named(own, fails, tmp_path, content, word):
    write_folder(tmp_path / "photos", values=(0, 1))
    for index in range(5):  # those without a mask are for training
        (tmp_path / "photos" / "masks" / f"{index:02}.png").unlink()
    names = {f"{index:02}": [{"x": 1, "y": 2, "cls": 0}] for index in range(1, 6)}
    if content.startswith(b'{"00"') and word != "digits":
        content = content[:-1] + b", " + json.dumps(names).encode()[1:]
    (tmp_path / "points.json").write_bytes(content)
    config = own(sparse={"class_path": "PointFiles", "init_args": {"files": "points.json"}})
    message = fails(f"fit --config {config}")
    assert word in message
    assert "points.json" in message


def test_long_names_of_pictures_are_predicted(genseg, config, checkpoint, tmp_path):
    names = ["x" * 240, "\u00e4" * 120, "y" * 251]
    (tmp_path / "album").mkdir()
    for name in names:
        Image.new("RGB", (20, 20)).save(tmp_path / "album" / f"{name}.png")
    words = f"predict --config {config} --ckpt_path {checkpoint} --data.predict_root album"
    genseg(f"{words} --predictions.output_dir out")
    assert {path.stem for path in (tmp_path / "out" / "masks").iterdir()} == set(names)


@pytest.mark.parametrize("folder", ["/proc/predictions", "photo.png/out"])
def test_folders_that_cannot_be_written_are_named(fails, config, checkpoint, tmp_path, folder):
    Image.new("RGB", (20, 20)).save(tmp_path / "photo.png")
    words = f"predict --config {config} --ckpt_path {checkpoint} --data.predict_root photo.png"
    assert folder in fails(f"{words} --predictions.output_dir {folder}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--model.optimizer AdamW --model.optimizer.lr fast",
            "model.optimizer.lr is fast; it must",
        ),
        ("--model.lr_scheduler StepLR --model.lr_scheduler.step_size often", "be a whole number"),
        ("--data.batch_size many", "--data.batch_size is many; it must be a whole number"),
        ("--data.class_balanced maybe", "--data.class_balanced is maybe; it must be true or false"),
        ("--model.optimizer AdmW", "there is no class AdmW"),
    ],
)
def test_wrong_values_are_told_from_wrong_classes(fails, config, words, message):
    assert message in fails(f"fit --config {config} {words}")


def test_num_classes_is_told_as_it_was_given(own, fails):
    assert "num_classes is -3;" in fails(f"fit --config {own(num_classes=-3)}")


# --- samples that are broken -----------------------------------------------------------------


@pytest.fixture
def broken(tmp_path):
    """Twelve images: one cut, one mask of another size, one without a mask, one name twice."""
    root = write_folder(tmp_path / "photos", count=12, values=(0, 1))
    path = root / "images" / "02.png"
    path.write_bytes(path.read_bytes()[:60])
    Image.new("L", (9, 9)).save(root / "masks" / "05.png")
    (root / "masks" / "07.png").unlink()
    Image.new("RGB", (32, 32)).save(root / "images" / "09.jpg")
    return root


def test_check_goes_on_past_every_problem(own, fails, broken, tmp_path):
    fails(f"check --config {own()}")
    report = json.loads((tmp_path / "data_check" / "data_check.json").read_text())
    text = "\n".join(problem["problem"] for problem in report["problems"])
    for name in ("02.png", "05.png", "'07'", "09.jpg"):
        assert name in text
    assert sum(report["splits"][split]["images"] for split in ("train", "val")) == 11


def test_broken_samples_are_left_out_if_asked_for(own, genseg, fails, broken, tmp_path):
    fails(f"fit --config {own()}")
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        genseg(f"fit --config {own(on_error='skip')}")
    told = "\n".join(str(one.message) for one in record)
    assert "samples are left out" in told
    for name in ("02", "05", "07", "09.jpg"):
        assert name in told
    assert list(tmp_path.rglob("last.ckpt"))


def points(tmp_path, wrong):
    """Points of six images; further ones for the first of them."""
    good = [{"x": 1, "y": 2, "cls": 0}, {"x": 9, "y": 9, "cls": 1}]
    content = {f"{index:02}": [*good, *wrong[index : index + 1]] for index in range(6)}
    (tmp_path / "points.json").write_text(json.dumps(content))
    return {"class_path": "PointFiles", "init_args": {"files": "points.json"}}


def scribbles(tmp_path, wrong):
    """The same as ScribbleSup's XML."""
    (tmp_path / "xml").mkdir()
    for index in range(6):
        lines = [("class_0", [(1, 2), (5, 9)]), ("class_1", [(9, 9)])]
        lines += [(f"class_{one['cls']}", [(one["x"], one["y"])]) for one in wrong[index:][:1]]
        polygons = "".join(
            f"<polygon><tag>{tag}</tag>"
            + "".join(f"<point><X>{x}</X><Y>{y}</Y></point>" for x, y in places)
            + "</polygon>"
            for tag, places in lines
        )
        size = "<size><width>32</width><height>32</height></size>"
        text = f"<annotation>{size}{polygons}</annotation>"
        (tmp_path / "xml" / f"{index:02}.xml").write_text(text)
    return {"class_path": "ScribbleFiles", "init_args": {"folder": "xml"}}


WRONG = [{"x": 50, "y": 1, "cls": 1}, {"x": 1, "y": -9, "cls": 1}, {"x": 1, "y": 1, "cls": 7}]


@pytest.mark.parametrize("make", [points, scribbles])
def test_wrong_marks_are_told_before_the_first_step_and_left_out_if_asked_for(
    own, genseg, fails, tmp_path, make
):
    write_folder(tmp_path / "photos", values=(0, 1))
    for index in range(5):  # those without a mask are for training
        (tmp_path / "photos" / "masks" / f"{index:02}.png").unlink()
    sparse = make(tmp_path, WRONG)
    message = fails(f"fit --config {own(sparse=sparse)}")
    assert "it is one of 3" in message
    assert "lies outside the image" in message
    assert not list(tmp_path.rglob("last.ckpt"))
    fails(f"check --config {own(sparse=sparse)}")
    report = json.loads((tmp_path / "data_check" / "data_check.json").read_text())
    assert [problem["name"] for problem in report["problems"]] == ["00", "01", "02"]
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        genseg(f"fit --config {own(sparse=sparse, on_error='skip')}")
    assert any("3 points or scribbles are left out" in str(one.message) for one in record)
    assert list(tmp_path.rglob("last.ckpt"))


@pytest.mark.filterwarnings("ignore:.* points or scribbles are left out")
def test_nothing_is_trained_without_a_single_mark(own, fails, tmp_path):
    write_folder(tmp_path / "photos", values=(0, 1))
    content = {f"{index:02}": [WRONG[0]] for index in range(6)}
    (tmp_path / "points.json").write_text(json.dumps(content))
    sparse = {"class_path": "PointFiles", "init_args": {"files": "points.json"}}
    config = own(sparse=sparse, on_error="skip")
    assert "no training image has a right point or scribble" in fails(f"fit --config {config}")
