"""Keep what runs have measured, and write the tables of the documentation from it.

    python experiments/make_results.py origin RUN
    python experiments/make_results.py add NAME RUN [SET=TEST_RUN ...]
    python experiments/make_results.py

`origin` notes in ``origin.json`` which commit is about to train a run, and on what. `add` reads
that, the run's ``val_metrics.json``, the losses of its last eighth and every validation mIoU from
``metrics.csv``, and ``metrics.json`` and ``anomaly_scores.json`` of its tests, and writes
``results/NAME/seedN.json``; a run that is added again keeps its origin. Without arguments the
tables between the markers in the documentation are written anew: mean and spread (standard
deviation) over the seeds.
"""

import csv
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import yaml

HERE = Path(__file__).parent
RESULTS = HERE / "results"
DOCS = HERE.parent / "docs"
PAGES = (
    HERE / "idd_lite" / "README.md",
    HERE / "msrc" / "README.md",
    DOCS / "results.md",
    *sorted((DOCS / "results").glob("*.md")),
    DOCS / "cgmgm.md",
)
ANOMALY_SETS = {
    "FS_Static_val": "Static",
    "FS_LostAndFound_val": "Lost & Found",
    "RoadAnomaly": "RoadAnomaly",
}


def add(name, run, tests):
    """Keep one run as a small file."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    seed = config["seed_everything"]
    path = RESULTS / name / f"seed{seed}.json"
    val = _read(run / "val_metrics.json")
    kept = json.loads(path.read_text()) if path.exists() else {}
    same = kept.get("val") == val
    known = kept if same else began(run)
    rows = _rows(run / "metrics.csv")
    result = {
        "name": name,
        "seed": seed,
        "steps": config["trainer"]["max_steps"],
        **{key: known[key] for key in ("commit", "changed", "hardware")},
        "train": last_losses(rows),
        "curve": val_curve(rows),
        "val": val,
        "test": kept["test"] if same else {},  # a call may bring some of the tests
    }
    for test in tests:
        key, _, folder = test.partition("=")
        result["test"][key] = _read(Path(folder) / "metrics.json")
        scores = Path(folder) / "anomaly_scores.json"
        if scores.exists():
            result["test"][key]["scores"] = json.loads(scores.read_text())
    keep(path, result)


def last_losses(rows):
    """Mean of each training loss over the last eighth of the steps."""
    start = max(int(row["step"]) + 1 for row in rows) * 7 // 8
    late = [row for row in rows if int(row["step"]) >= start]
    losses = {}
    for name in rows[0]:
        values = [float(row[name]) for row in late if row[name] and name.startswith("train_")]
        if values:
            losses[name.removeprefix("train_")] = statistics.mean(values)
    return losses


def val_curve(rows):
    """Validation mIoU by the number of steps before it."""
    return {str(int(r["step"]) + 1): float(r["val_mIoU"]) for r in rows if r.get("val_mIoU")}


def _rows(path):
    with path.open() as lines:
        return list(csv.DictReader(lines))


def cross_entropy(run):
    """The cross-entropy in a training loss: a part of it, or all of softmax's."""
    return run["train"].get("loss_ce", run["train"]["loss"])


def keep(path, result):
    """Write a result where the tables look for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"kept as {path}")


def origin():
    """What a run's numbers belong to: the commit, and what it runs on."""
    return {
        "commit": _output("git", "rev-parse", "HEAD"),
        "changed": bool(_output("git", "status", "--porcelain", "--untracked-files=no")),
        "hardware": hardware(),
    }


def hardware():
    """The processor by its name, as far as the system tells it, and the threads of a process."""
    told = Path("/proc/cpuinfo")  # elsewhere Python knows it
    lines = told.read_text().splitlines() if told.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, threads: {os.environ.get('OMP_NUM_THREADS', os.cpu_count())}"


def note_origin(run):
    """Note it beside a run; a run that goes on must do so at the commit where it began.

    Raises:
        SystemExit: it began at another, or nobody noted at which.
    """
    path, now = run / "origin.json", origin()
    if path.exists() or (run / "checkpoints" / "last.ckpt").exists():
        then = began(run)
        if then["commit"] != now["commit"]:
            raise SystemExit(
                f"make_results: {run} was begun at commit {then['commit']} and this is "
                f"{now['commit']}: go on there, or remove the folder and start again."
            )
        now["changed"] |= then["changed"]
    path.write_text(json.dumps(now, indent=1) + "\n")


def began(run):
    """What `note_origin` has noted of a run.

    Raises:
        SystemExit: nothing.
    """
    path = run / "origin.json"
    if not path.exists():
        raise SystemExit(
            f"make_results: nobody noted at which commit {run} was begun: remove the folder and "
            "start again."
        )
    return _read(path)


def _read(path):
    report = json.loads(path.read_text())
    return {key: value for key, value in report.items() if key not in ("checkpoint", "epoch")}


def _output(*command):
    return subprocess.run(
        command, cwd=HERE, check=True, capture_output=True, text=True
    ).stdout.strip()


def runs(name):
    """All kept runs of a name, by seed."""
    results = [json.loads(path.read_text()) for path in (RESULTS / name).glob("seed*.json")]
    return sorted(results, key=lambda result: result["seed"])


def spread(values, digits=1, factor=100):
    """Mean and standard deviation over runs, as percent."""
    values = [factor * value for value in values]
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def ious_of(run, test=None):
    """IoU of every class on the validation data, or in a test."""
    return (run["test"][test] if test else run["val"])["IoU"]


def scored_in_every(results, test=None):
    """Classes that have an IoU in every run."""
    ious = [ious_of(run, test) for run in results]
    return [name for name in ious[0] if all(iou[name] is not None for iou in ious)]


def mean_iou(results, classes, test=None):
    """Mean and spread over runs of the mIoU over some classes."""
    return spread([statistics.mean(ious_of(r, test)[c] for c in classes) for r in results])


def closed_set(folder, rows, classes=None, loss=False, test=None):
    """mIoU over all classes, over `classes` if given, and IoU of each of these.

    Of the validation data, or of `test`. With `loss` the cross-entropy at the end of the training
    before them.

    All are those with an IoU in every run: one that is not in the labels has none, or 0 where a run
    predicts it, and would make rows means over different classes.
    """
    found = {name: runs(f"{folder}/{name}") for name in rows}
    known = scored_in_every([run for results in found.values() for run in results], test)
    shown = classes or known
    yield [
        *("", "runs"),
        *(["training cross-entropy"] if loss else []),
        f"mIoU of {len(known)}",
        *([f"of {len(shown)}"] if classes else []),
        *shown,
    ]
    for name, title in rows.items():
        results = found[name]
        if results:
            each = [[ious_of(r, test)[c] for c in shown] for r in results]
            yield [
                title,
                str(len(results)),
                *([spread(map(cross_entropy, results), digits=2, factor=1)] if loss else []),
                mean_iou(results, known, test),
                *([mean_iou(results, classes, test)] if classes else []),
                *(spread(column) for column in zip(*each, strict=True)),
            ]


def curves(rows):
    """Validation mIoU after each third of a training, of the runs that have kept it."""
    yield ["", "runs", "after a third of the steps", "two thirds", "all"]
    for name, title in rows.items():
        kept = [list(run["curve"].values()) for run in runs(name) if len(run.get("curve", ())) == 3]
        if kept:
            yield [title, str(len(kept)), *(spread(third) for third in zip(*kept, strict=True))]


def anomalies(folder, rows, scores=None, sets=ANOMALY_SETS):
    """AUROC / AP / FPR95 of every score, or of `scores` alone, on every set."""
    yield ["", "runs", "score", *sets.values()]
    for name, title in rows.items():
        results = [r for r in runs(f"{folder}/{name}") if set(sets) <= set(r["test"])]
        known = results[0]["test"][next(iter(sets))]["scores"] if results else ()
        for score in known if scores is None else (score for score in scores if score in known):
            cells = []
            for key in sets:
                kept = [r["test"][key]["scores"][score] for r in results]
                cells.append(
                    " / ".join(spread([k[m] for k in kept]) for m in ("AUROC", "AP", "FPR95"))
                )
            yield [title, str(len(results)), f"`{score}`", *cells]


def _scores(run):
    return next((test["scores"] for test in run["test"].values() if "scores" in test), {})


def starts(folder, rows):
    """Validation mIoU, and AUROC of `density` on the sets of anomalies where these were tested."""
    yield ["", "runs", "mIoU", *ANOMALY_SETS.values()]
    for name, title in rows.items():
        results = runs(f"{folder}/{name}")
        tests = [r["test"] for r in results if "density" in _scores(r)]
        yield [
            title,
            str(len(results)),
            spread([r["val"]["mIoU"] for r in results]),
            *(
                spread([test[key]["scores"]["density"]["AUROC"] for test in tests]) if tests else ""
                for key in ANOMALY_SETS
            ),
        ]


def costs(name):
    """Processor seconds of a training step and the memory of its process, by `cost.py`."""
    path = RESULTS / name / "cost.json"
    if not path.exists():
        return "", ""
    cost = json.loads(path.read_text())
    return f"{cost['step_seconds']:.2f}", f"{cost['memory_MB']:.0f}"


def by_seed(names):
    """Runs of all names, of the seeds that every name has: {seed: [run, ...]}."""
    found = [{run["seed"]: run for run in runs(name)} for name in names]
    seeds = sorted(set.intersection(*map(set, found)))
    return {seed: [each[seed] for each in found] for seed in seeds}


def few_shot_tests(folder, name, folds, shots):
    """Tests of all folds by seed, of the seeds that were tested with so many examples."""
    found = by_seed([f"{folder}/{name}/fold{fold}" for fold in range(len(folds))])
    tests = {seed: [run["test"] for run in each] for seed, each in found.items()}
    key = f"{shots}shot"
    return {s: [t[key] for t in each] for s, each in tests.items() if all(key in t for t in each)}


def mean_of(tests, key):
    """Mean and spread over seeds of a score's mean over the folds; blank where a test has none."""
    if any(key not in test for folds in tests.values() for test in folds):
        return ""
    return spread([statistics.mean(test[key] for test in folds) for folds in tests.values()])


def episodes(folder, rows, folds):
    """Test mIoU of every fold and of all, and the mean mIoU of the guidance; per cent."""
    yield ["", "examples", "runs", *folds, "mean", "guidance alone"]
    for shots in (1, 5):
        for name, title in rows.items():
            tests = few_shot_tests(folder, name, folds, shots)
            if tests:
                each = zip(*tests.values(), strict=True)
                yield [
                    title,
                    str(shots),
                    str(len(tests)),
                    *(spread([test["mIoU"] for test in fold]) for fold in each),
                    mean_of(tests, "mIoU"),
                    mean_of(tests, "GmIoU"),
                ]


def overview(folder, dense, frequent, episodic, folds):
    """All methods: mIoU over all classes, the frequent ones and the folds' own; ECE and costs."""
    found = {name: runs(f"{folder}/{name}") for name in dense}
    known = scored_in_every([run for results in found.values() for run in results])
    yield [
        "", "runs", f"mIoU of {len(known)}", f"of {len(frequent)}", f"of the {len(folds)}",
        "ECE", "seconds a step", "memory, MB",
    ]  # fmt: skip
    for name, title in dense.items():
        results = found[name]
        if results:
            errors = [r["test"]["val"]["ECE"] for r in results if "val" in r["test"]]
            yield [
                title,
                str(len(results)),
                *(mean_iou(results, classes) for classes in (known, frequent, folds)),
                spread(errors) if len(errors) == len(results) else "",
                *costs(f"{folder}/{name}"),
            ]
    for shots in (1, 5):
        for name, title in episodic.items():
            tests = few_shot_tests(folder, name, folds, shots)
            if tests:
                yield [
                    f"{shots} example{'s' * (shots > 1)}: {title}",
                    str(len(tests)),
                    *("", "", mean_of(tests, "mIoU"), mean_of(tests, "ECE")),
                    *costs(f"{folder}/{name}"),
                ]


def wrong_supports(folder, rows, folds):
    """mIoU of the answer and of the guidance, with supports of the class and of another one."""
    yield ["", "runs", "answer", "other supports", "guidance", "other supports"]
    for name, title in rows.items():
        tests = by_seed([f"{folder}/{name}/fold{fold}/wrong_support" for fold in range(len(folds))])
        if tests:
            cells = [
                spread([statistics.mean(t[whose][what] for t in found) for found in tests.values()])
                for what in ("final", "guidance")
                for whose in ("own", "another")
            ]
            yield [title, str(len(tests)), *cells]


def added_class(folder, without, trained):
    """IoU of a class that was added, of the draws of all runs, and the mean over the others."""
    added = {title: runs(f"{folder}/add_class/{name}") for name, title in without.items()}
    references = {title: runs(f"{folder}/{name}") for name, title in trained.items()}
    references = {title: found for title, found in references.items() if found}
    tables = [row["IoU"] for found in added.values() for run in found for row in run["rows"]]
    tables += [run["val"]["IoU"] for found in references.values() for run in found]
    new = next(run["class"] for found in added.values() for run in found)
    old = [name for name in tables[0] if all(table.get(name) is not None for table in tables)]
    yield ["", "images of it", "runs x draws", new, f"mIoU of the {len(old)} others"]
    for title, found in added.items():
        for count in sorted({row["images"] for run in found for row in run["rows"]}):
            rows = [row["IoU"] for run in found for row in run["rows"] if row["images"] == count]
            yield [
                title,
                str(count),
                f"{len(found)} x {len(rows) // len(found)}",
                spread([row[new] for row in rows]) if count else "",
                spread([statistics.mean(row[name] for name in old) for row in rows]),
            ]
    for title, found in references.items():
        yield [title, "all", str(len(found)), mean_iou(found, [new]), mean_iou(found, old)]


IDD_LITE = {
    "softmax_fpn": "softmax",
    "gmmseg_fpn": "GMMSeg",
    "gmmseg_sum": "GMMSeg, `mixture.density: logsumexp`",
    "gmmseg_frozen": "frozen encoder, EM alone",
}
MEANS_ON_IDD_LITE = {
    "softmax_fpn": "softmax",
    "gmmseg_fpn": "GMMSeg: a thousandth in each step",
    "gmmseg_int5": "`em.interval: 5`: in every fifth step",
    "gmmseg_mm9999": "`em.mean_momentum: 0.9999`: a tenth of that in each step",
    "gmmseg_sum": "a thousandth, `mixture.density: logsumexp`",
    "gmmseg_int5_sum": "`em.interval: 5`, `mixture.density: logsumexp`",
    "gmmseg_mm9999_sum": "`em.mean_momentum: 0.9999`, `mixture.density: logsumexp`",
}
CAMVID = {
    "softmax_fpn": "softmax",
    "gmmseg_fpn": "GMMSeg",
    "gmmseg_mm9999": "GMMSeg, `em.mean_momentum: 0.9999`",
}
COMPOSITE = {"composite": "pasted objects"}
ON_THE_DECODER_OF_GSS = {
    "softmax_mla": "softmax on GSS' decoder",
    "gss_ff": "GSS, `decoder.classes: shared`",
    "gss_free": "GSS, `decoder.classes: free`",
    "gss_majority": "GSS, `majority-4`",
}
CURVES = {
    "idd_lite/softmax_fpn": "IDD-Lite, 3 000 steps: softmax",
    "idd_lite/gmmseg_fpn": "IDD-Lite, 3 000 steps: GMMSeg",
    "camvid_full/softmax_fpn": "CamVid, 1 500 steps: softmax",
    "camvid_full/gmmseg_fpn": "CamVid, 1 500 steps: GMMSeg",
    "idd_lite/softmax_mla": "IDD-Lite, 1 500 steps: softmax on GSS' decoder",
    "idd_lite/gss_ff": "IDD-Lite, 1 500 steps: GSS, `decoder.classes: shared`",
    "camvid_half/softmax_mla": "CamVid at half size, 1 000 steps: softmax on GSS' decoder",
    "camvid_half/gss_ff": "CamVid at half size, 1 000 steps: GSS, `decoder.classes: shared`",
}
STARTS = {
    "random": "`random`",
    "orthogonal": "`orthogonal`, of zero sum",
    "kmeans_apart": "k-means of the first batch, classes apart",
    "kmeans": "k-means of the first batch",
    "handover": "300 steps of softmax, then 500 of GMMSeg",
    "decay": "`random`, with `em.memory: decay`",
    "softmax": "softmax",
}
VOC_ANIMALS = {
    "softmax_masks": "masks: softmax",
    "gmmseg_masks": "masks: GMMSeg",
    "gmmseg_frozen": "masks: frozen encoder, EM alone",
    "gss_ff": "masks: GSS, `classes: shared`",
    "softmax_fpn": "clicks: partial cross-entropy",
    "gmmseg_frozen_clicks": "clicks: frozen encoder, EM alone",
    "gmmseg_fpn": "clicks: GMMSeg",
    "agmm_fpn": "clicks: AGMM, `code`",
    "agmm_paper": "clicks: AGMM, `paper`",
    "softmax_deeplab": "clicks: partial cross-entropy, the decoder of AGMM's authors",
    "agmm_deeplab": "clicks: AGMM, `code`, their decoder",
}
AGMM_ON_VOC_ANIMALS = {
    "softmax_fpn": "partial cross-entropy",
    "agmm_fpn": "AGMM, `code`",
    "agmm_self0": "`self_weight: 0`",
    "agmm_gauss0": "`gaussian_weight: 0`",
    "agmm_contrast0": "`contrast_weight: 0`",
    "agmm_image0": "`image_class_weight: 0`",
}
LONGER_ON_VOC_ANIMALS = {
    "softmax_fpn": "partial cross-entropy, 800 steps",
    "agmm_paper": "AGMM, `paper`, 800 steps",
    "softmax_1600": "partial cross-entropy, 1 600 steps",
    "agmm_paper_1600": "AGMM, `paper`, 1 600 steps",
}
GMMSEG_ON_VOC_ANIMALS = {
    "softmax_masks": "softmax",
    "gmmseg_masks": "GMMSeg",
    "gmmseg_masks_sum": "`mixture.density: logsumexp`",
    "gmmseg_masks_d256": "`mixture.embedding_dim: 256`",
    "gmmseg_masks_d256_sum": "both of these",
    "gmmseg_masks_m1": "`mixture.components: 1`",
    "gmmseg_masks_mm99": "`em.mean_momentum: 0.99`",
    "gmmseg_masks_mm1": "`em.mean_momentum: 1`: means stay where they begin",
    "gmmseg_masks_int5": "`em.interval: 5`",
    "gmmseg_masks_vf02": "`mixture.variance_floor: 0.02`",
    "gmmseg_masks_grad": "`em.train: gradient`",
}
WITHOUT_THE_CLASS = {
    "gmmseg_frozen_nohorse": "frozen encoder, added",
    "gmmseg_nohorse": "trained without it, added",
    "gmmseg_nohorse_0.0": "the same, `shrinkage` 0",
}
WITH_THE_CLASS = {
    "gmmseg_frozen": "frozen encoder, EM alone",
    "gmmseg_masks": "GMMSeg trained with it",
    "softmax_masks": "softmax trained with it",
}
FROZEN = {
    "gmmseg_frozen_plain": "as in the paper: uniform prior, own covariances",
    "gmmseg_frozen_prior": "`mixture.class_prior: frequency`",
    "gmmseg_frozen_shrunk": "`mixture.shrinkage: 1`",
    "gmmseg_frozen": "both",
}
EPISODIC = {
    "prototypes": "prototypes, cosine, untrained",
    "bam": "BAM",
    "cgmgm": "CGMGM",
}
REFINEMENT = {
    "none": "`none`",
    "cycle": "`cycle`, the paper's",
    "cycle_support": "`cycle_support`",
    "supports": "mixtures of the supports alone",
}
ANIMALS = ("cat", "cow", "dog", "horse", "sheep")
MSRC_FOLDS = ("fold 0", "fold 1", "fold 2", "fold 3")
FREQUENT = ("background", "cat", "cow", "dog", "horse", "sheep", "person")
SHORT = ("msp", "energy", "mahalanobis", "density", "half_relative_density")
TABLES = {
    "idd_lite closed set": lambda: closed_set("idd_lite", IDD_LITE),
    "idd_lite means": lambda: closed_set("idd_lite", MEANS_ON_IDD_LITE, loss=True),
    "idd_lite means and anomalies": lambda: anomalies(
        "idd_lite", MEANS_ON_IDD_LITE, ("density", "energy", "mahalanobis")
    ),
    "idd_lite anomalies in short": lambda: anomalies("idd_lite", IDD_LITE, SHORT),
    "camvid closed set": lambda: closed_set("camvid_full", CAMVID, test="test"),
    "curves": lambda: curves(CURVES),
    "camvid composite": lambda: anomalies("camvid_full", CAMVID, SHORT, COMPOSITE),
    "idd_lite gss": lambda: closed_set("idd_lite", ON_THE_DECODER_OF_GSS),
    "camvid gss": lambda: closed_set("camvid_half", ON_THE_DECODER_OF_GSS, test="test"),
    "idd_lite starts": lambda: starts("idd_lite_half", STARTS),
    "voc_animals": lambda: closed_set("voc_animals", VOC_ANIMALS, FREQUENT),
    "voc_animals agmm": lambda: closed_set("voc_animals", AGMM_ON_VOC_ANIMALS, FREQUENT),
    "voc_animals longer": lambda: closed_set("voc_animals", LONGER_ON_VOC_ANIMALS, FREQUENT),
    "voc_animals gmmseg": lambda: closed_set(
        "voc_animals", GMMSEG_ON_VOC_ANIMALS, FREQUENT, loss=True
    ),
    "voc_animals frozen": lambda: closed_set("voc_animals", FROZEN, FREQUENT),
    "voc_animals overview": lambda: overview(
        "voc_animals", VOC_ANIMALS, FREQUENT, EPISODIC, ANIMALS
    ),
    "voc_animals episodes": lambda: episodes("voc_animals", EPISODIC, ANIMALS),
    "voc_animals wrong supports": lambda: wrong_supports("voc_animals", EPISODIC, ANIMALS),
    "msrc episodes": lambda: episodes("msrc", EPISODIC, MSRC_FOLDS),
    "msrc wrong supports": lambda: wrong_supports("msrc", EPISODIC, MSRC_FOLDS),
    "msrc refinement": lambda: episodes("msrc/refinement", REFINEMENT, MSRC_FOLDS),
    "voc_animals added class": lambda: added_class(
        "voc_animals", WITHOUT_THE_CLASS, WITH_THE_CLASS
    ),
    "idd_lite anomalies": lambda: anomalies("idd_lite", IDD_LITE),
}


def table(name):
    """A table of the pages, in Markdown."""
    head, *rows = TABLES[name]()
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def with_tables(text):
    """A page with its tables renewed: `<!-- table: NAME -->` to `<!-- end of the table -->`."""
    parts = text.split("<!-- table: ")
    for index, part in enumerate(parts[1:], start=1):
        name, _, rest = part.partition(" -->\n")
        _, end, after = rest.partition("<!-- end of the table -->")
        parts[index] = f"{name} -->\n\n{table(name)}\n\n{end}{after}"
    return "<!-- table: ".join(parts)


if __name__ == "__main__":
    if sys.argv[1:2] == ["origin"]:
        note_origin(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["add"]:
        add(sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
    else:
        for page in PAGES:
            page.write_text(with_tables(page.read_text()))
