"""The documentation: links, Python, commands and YAML are what the package understands."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import Trainer
from PIL import Image

import lightning_genseg
from lightning_genseg import GMMSeg, __version__, methods

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINKED = [*PAGES, ROOT / "CHANGELOG.md", *sorted((ROOT / "experiments").rglob("*.md"))]


def name(path):
    return str(path.relative_to(ROOT))


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def pages_with(language):
    return [pytest.param(page, id=name(page)) for page in PAGES if blocks(page, language)]


def anchors(page):
    """The names that a forge gives to the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", LINKED, ids=name)
def test_links(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{link} leads nowhere"
        assert not anchor or anchor in anchors(target), f"{link}: there is no such heading"


@pytest.mark.parametrize("page", pages_with("python"))
def test_python(page, tmp_path, monkeypatch):
    """All blocks of a page, one after the other, as somebody pastes them into one session."""
    monkeypatch.chdir(tmp_path)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.strategy.connect(GMMSeg(3, encoder="tu-test_resnet", decoder="fpn"))
    code = "".join(blocks(page, "python"))
    for path in re.findall(r'"([\w/]+\.ckpt)"', code):  # what `genseg fit` writes
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        trainer.save_checkpoint(path)
    Image.new("RGB", (96, 64)).save("photo.jpg")
    line = {"name": "a", "anomalous": 0.25}  # what `genseg predict` writes
    Path("predicted").mkdir()
    Path("predicted/predictions.jsonl").write_text(json.dumps(line) + "\n")
    names = {"__name__": "docs"}
    for block in blocks(page, "python"):
        if "onnxruntime" in block:
            continue  # run by tests/cli/test_export.py, without this package
        exec(compile(block, name(page), "exec"), names)
        for key, value in names.items():  # a class of CONTRIBUTING.md, which then exports it
            if isinstance(value, type) and value.__module__ == "docs":
                monkeypatch.setattr(lightning_genseg, key, value, raising=False)


def recipes():
    """The YAML that a run's folder comes from, by the folder."""
    found = {}
    for path in (ROOT / "experiments").rglob("*.yaml"):
        logger = (yaml.safe_load(path.read_text()).get("trainer") or {}).get("logger") or {}
        place = {"save_dir": f"runs/{path.parent.name}", "name": path.stem}
        found["{save_dir}/{name}".format(**place | logger.get("init_args", {}))] = str(path)
    return found


def commands(block):
    """The words of every `genseg` in a block, with variables and line ends read by a real shell."""
    block = re.sub(r".*\.venv/bin/genseg", "genseg", block)
    stub = "genseg() { printf '%q ' \"$@\"; echo; }\n"
    result = subprocess.run(["bash", "-eu"], input=stub + block, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [shlex.split(line) for line in result.stdout.splitlines()]


def recipe_of(word, known):
    """A run's configuration is the recipe it came from; other files of a run are made by none."""
    if not word.startswith("runs/"):
        return word
    folder = re.sub(r"(/fold\d)?/[^/]+/(config\.yaml|checkpoints/[\w-]+\.ckpt)$", "", word)
    if folder.removeprefix("runs/") in methods.__all__:  # of a fit without a file
        return word
    assert folder in known, f"no recipe writes {word}"
    return known[folder] if word.endswith(".yaml") else word


@pytest.mark.parametrize("page", pages_with("bash"))
def test_commands(page, genseg, monkeypatch):
    monkeypatch.chdir(ROOT)
    known = recipes()
    for block in blocks(page, "bash"):
        if "genseg" not in block:
            continue
        for words in commands(block):
            assert_parses(genseg, [recipe_of(word, known) for word in words])


@pytest.mark.parametrize("page", pages_with("yaml"))
def test_yaml(page, genseg, tmp_path):
    for block in blocks(page, "yaml"):
        (tmp_path / "mine.yaml").write_text(block)
        assert_parses(genseg, ["fit", "--config", "mine.yaml"])


def assert_parses(genseg, words):
    with pytest.raises(SystemExit) as end:
        genseg(shlex.join(words if words[1].endswith("help") else [*words, "--print_config"]))
    assert not end.value.code, f"genseg {shlex.join(words)}: see the captured stderr"


def test_diffs_fit_the_code():
    """The lines that a diff of ours takes away or leaves are there, one after the other."""
    folders = ("lightning_genseg", "tests")
    code = [path.read_text() for folder in folders for path in (ROOT / folder).rglob("*.py")]
    diffs = [diff for page in PAGES for diff in blocks(page, "diff")]
    assert diffs
    for diff in diffs:
        old = "".join(line[1:] for line in diff.splitlines(True) if not line.startswith("+"))
        assert old.strip()
        assert sum(text.count(old) for text in code) == 1, old


@pytest.mark.parametrize("notebook", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=name)
def test_notebooks_show_what_they_give(notebook):
    assert notebook.stat().st_size < 400_000
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if "outputs" in cell]
    counts = [cell["execution_count"] for cell in cells]
    assert counts == list(range(1, len(cells) + 1)), "run notebooks/refresh.py"
    assert "image/png" in {kind for c in cells for o in c["outputs"] for kind in o.get("data", ())}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 800


def test_one_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    heading = f"## [{__version__}] - {citation['date-released']}\n"
    assert heading in (ROOT / "CHANGELOG.md").read_text()
