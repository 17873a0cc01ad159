"""What learns from masks alone: the contract of all of it, then tokenizers, then colours."""

import json

import pytest
import torch
from lightning.pytorch import seed_everything
from PIL import Image

from lightning_genseg import LearnedColors, MaskigeTokenizer, VariationOptions
from lightning_genseg.cli.reconstruct import reconstruct_data
from lightning_genseg.data import CrossDomainDataModule, FolderDataModule
from lightning_genseg.errors import GenSegError
from lightning_genseg.methods.gss.colors import class_colors
from lightning_genseg.methods.gss.maskige import Maskige
from lightning_genseg.methods.gss.tokenizers.dalle import DalleDVAE
from lightning_genseg.methods.gss.tokenizers.load import make_tokenizer
from tests.contract import NUM_CLASSES, batch_of, loader, save, trainer, types_of, wrong_values
from tests.domains import FIELD, TABLE, write_domain
from tests.methods.gss.parts import write_tokenizer

NETWORK = {"levels": [5, 5, 4], "channels": 16, "blocks": 1}
UNVARIED = {"permute_classes": False, "corrupted_share": 0.0, "procedural_share": 0.0}


@pytest.fixture
def dalle(tmp_path):
    """Weights of a small dVAE, random."""
    torch.manual_seed(0)
    torch.save(DalleDVAE(16, 8).state_dict(), tmp_path / "dalle.bin")
    return tmp_path / "dalle.bin"


def tokenizer_run(**arguments):
    return MaskigeTokenizer(**{"num_classes": NUM_CLASSES, "network": NETWORK, **arguments})


def colors_run(tokenizer, **arguments):
    return LearnedColors(
        **{"num_classes": NUM_CLASSES, "width": 8, **arguments}, tokenizer=tokenizer
    )


@pytest.mark.parametrize("kind", ["MaskigeTokenizer", "LearnedColors"])
class TestContract:
    """As `ModuleContract`, for modules that know no images."""

    @pytest.fixture(autouse=True)
    def _dalle(self, dalle):
        self.dalle = dalle

    def make(self, kind, **arguments):
        if kind == "MaskigeTokenizer":
            return tokenizer_run(**arguments)
        return colors_run(self.dalle, **arguments)

    def test_pretrained(self, kind, tmp_path):
        model = self.make(kind)
        model.save_pretrained(tmp_path / "shared")
        self.dalle.unlink()
        loaded = type(model).from_pretrained(tmp_path / "shared")
        before, after = (m.eval().maps_at_labels(batch_of())["scores"] for m in (model, loaded))
        assert torch.equal(before, after)

    def test_fit_log_save_and_load(self, kind, tmp_path):
        table = [[30 * i, 255 - 40 * i, 20] for i in range(NUM_CLASSES)] + [[0, 0, 0]]
        (tmp_path / "colors.json").write_text(json.dumps(table))
        names = [f"class {c}" for c in range(NUM_CLASSES)]
        model = self.make(kind, colors=tmp_path / "colors.json", class_names=names)
        run = trainer(tmp_path)
        run.fit(model, loader(), loader(2))
        assert {"train_loss", "val_mIoU", "val_IoU_class_0"} <= set(run.callback_metrics)
        run.save_checkpoint(tmp_path / "model.ckpt")
        (tmp_path / "colors.json").unlink()  # the checkpoint holds what the files held
        self.dalle.unlink()
        content = torch.load(tmp_path / "model.ckpt", weights_only=True)
        assert content["tokenizer"] == model.tokenizer.config()
        loaded = type(model).load_from_checkpoint(tmp_path / "model.ckpt")
        assert loaded.tokenizer.fingerprint() == model.tokenizer.fingerprint()
        assert loaded.maskige.fingerprint() == model.maskige.fingerprint()
        assert loaded.class_names == names
        before, after = (m.eval().maps_at_labels(batch_of())["scores"] for m in (model, loaded))
        assert torch.equal(before, after)
        assert before.shape == (2, NUM_CLASSES, 48, 64)
        result = trainer(tmp_path).test(loaded, loader(2), verbose=False)[0]
        assert 0 <= result["test_mIoU"] <= 1

    def test_training_is_the_same_under_the_same_seed(self, kind):
        runs = []
        for seed in (3, 3, 4):
            seed_everything(seed, verbose=False)
            model = self.make(kind)
            runs.append([model.compute_loss(batch_of())["loss"].item() for _ in range(2)])
        assert runs[0] == runs[1] != runs[2]

    def test_images_are_not_looked_at(self, kind):
        losses = []
        for batch in (batch_of(), {"mask": batch_of()["mask"]}):
            torch.manual_seed(0)
            losses.append(self.make(kind).compute_loss(batch)["loss"])
        assert torch.equal(*losses)

    def test_without_a_label_there_is_nothing_to_learn(self, kind):
        arguments = {"variation": UNVARIED} if kind == "MaskigeTokenizer" else {}
        model = self.make(kind, **arguments)
        for training in (True, False):
            losses = model.train(training).compute_loss({"mask": torch.full((2, 30, 37), 255)})
            losses["loss"].backward()
            assert losses["loss"] == 0
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)

    def test_number_of_classes(self, kind, tmp_path):
        path = save(self.make(kind), tmp_path / "six.ckpt")
        with pytest.raises(ValueError, match=r"trained on 6 classes and .* 4; "):
            trainer(tmp_path).test(self.make(kind, num_classes=4), loader(2), ckpt_path=path)

    def test_command_line(self, kind, tmp_path, genseg, capsys):
        arguments = {"num_workers": 0, "size": [48, 64], "crop_size": [48, 64], "val_length": 2}
        data = {"class_path": "SyntheticScenesDataModule", "init_args": arguments}
        (tmp_path / "data.yaml").write_text(json.dumps({"data": data}))
        own = (
            "--model.network.channels 8"
            if kind == "MaskigeTokenizer"
            else "--model.tokenizer dalle.bin"
        )
        genseg(f"fit --config data.yaml --model {kind} {own} --trainer.max_steps 1 "
               "--trainer.accelerator cpu --trainer.enable_progress_bar false")  # fmt: skip
        (config,) = tmp_path.rglob("config.yaml")
        (checkpoint,) = tmp_path.rglob("*.ckpt")
        self.dalle.unlink()
        after = f"--config {config} --ckpt_path {checkpoint} --trainer.logger false"
        genseg(f"test {after}")
        assert "test_mIoU" in capsys.readouterr().out
        (tmp_path / "photos").mkdir()
        Image.new("RGB", (64, 48)).save(tmp_path / "photos" / "a.png")
        for command, more in (("predict", "--data.predict_root photos"), ("calibrate", "")):
            with pytest.raises(SystemExit):
                genseg(f"{command} {after} {more}")
            assert f"a {kind} knows masks only" in capsys.readouterr().err

    def test_choices_and_numbers(self, kind):
        hints = types_of(type(self.make(kind)))
        for name in hints.keys() - {"ignore_index"}:
            for wrong in wrong_values(hints[name], signed=False):
                with pytest.raises(GenSegError, match=rf"^{name} is .*; it must be "):
                    self.make(kind, **{name: wrong})

    def test_masks_of_other_classes_are_refused(self, kind, tmp_path):
        write_domain(tmp_path / "field", "field", 1)
        (tmp_path / "all.txt").write_text("0")
        (tmp_path / "table.tsv").write_text(TABLE)
        field = FolderDataModule(
            tmp_path / "field", class_names=FIELD, test_list=tmp_path / "all.txt", num_workers=0
        )
        data = CrossDomainDataModule(field, tmp_path / "table.tsv", "field", num_workers=0)
        model = self.make(kind, num_classes=data.num_classes)
        with pytest.raises(
            ValueError, match=r"others \(heaven, ground, \.\.\.\): test it on Mixed"
        ):
            trainer(tmp_path).test(model, data)
        with pytest.raises(ValueError, match="reconstruct draws masks in the colours of the univ"):
            reconstruct_data(data, split="test", output_dir=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variation": {"corrupted_share": 1.5}}, "corrupted_share is 1.5; it must be between 0"),
        ({"variation": {"procedural_share": -0.1}}, "procedural_share is -0.1; it must be between"),
        ({"network": {"levels": []}}, "levels is empty"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be positive"),
        ({"scale": 0.0}, "scale is 0.0; it must be positive"),
        ({"colors": "ade20k"}, "colors ade20k is for 150 classes"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(GenSegError, match=message):
        tokenizer_run(**arguments)


# --- tokenizers --------------------------------------------------------------------------------


def test_colours_of_ignored_pixels_are_seen_across_the_border_alone():
    model = tokenizer_run(variation=UNVARIED)
    mask = batch_of()["mask"].clone()
    half = model.compute_loss({"mask": mask[..., :32]})["loss"]
    mask[..., 32:] = 255
    torch.testing.assert_close(model.compute_loss({"mask": mask})["loss"], half, rtol=0.05, atol=0)


def test_objectives():
    batch = batch_of()
    for objective, names in (
        ("l1", {"loss_l1"}),
        ("cross_entropy", {"loss_cross_entropy"}),
        ("both", {"loss_l1", "loss_cross_entropy"}),
    ):
        model = tokenizer_run(objective=objective).eval()
        losses = model.compute_loss(batch)
        assert set(losses) == {"loss", *names}
        torch.testing.assert_close(losses["loss"], sum(losses[name] for name in names))
        losses["loss"].backward()
        assert all(p.grad.any() for n, p in model.named_parameters() if "spatial" not in n)
    target = model.maskige(batch["mask"])
    picture = model.tokenizer(target)
    labelled = (batch["mask"] != 255)[:, None].expand_as(target)
    expected = (picture - target)[labelled].abs().mean()
    torch.testing.assert_close(losses["loss_l1"], expected)


def test_masks_are_varied():
    mask = batch_of(0, 8)["mask"]
    assert torch.equal(tokenizer_run(variation=UNVARIED).vary(mask), mask)
    for changed in ({"permute_classes": True}, {"corrupted_share": 1.0}, {"procedural_share": 1.0}):
        varied = tokenizer_run(variation=VariationOptions(**{**UNVARIED, **changed})).vary(mask)
        assert varied.shape == mask.shape
        assert all((a != b).any() for a, b in zip(varied, mask, strict=True))


def test_a_checkpoint_of_other_colours_is_refused(tmp_path):
    path = save(tokenizer_run(), tmp_path / "lattice.ckpt")
    with pytest.raises(ValueError, match="trained with other colors: use the same"):
        trainer(tmp_path).test(tokenizer_run(colors="random"), loader(2), ckpt_path=path)


# --- colours -----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["tf", "tt"])
def test_colours_are_learned_and_nothing_else(dalle, variant):
    model = colors_run(dalle, variant=variant)
    before = model.tokenizer.fingerprint()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.5)
    table = model.color_table
    model.compute_loss(batch_of())["loss"].backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name == "logits" or name.startswith("inverse."))
    assert (model.logits.grad.abs().sum(1) > 0).all()
    optimizer.step()
    assert model.color_table[:-1] != table[:-1]
    assert model.color_table[-1] == table[-1]
    assert model.tokenizer.fingerprint() == before


def test_the_closed_form_inverse_gives_no_gradient(dalle):
    """Of `tf` only the tokenizer's reconstruction and the distance to it move the colours."""
    model = colors_run(dalle)
    model.tokenizer.straight_through = lambda picture, temperature: picture.detach()
    losses = model.compute_loss(batch_of())
    assert not losses["loss_cross_entropy"].requires_grad
    assert losses["loss_distance"].requires_grad


def test_fit_leaves_colours_for_the_next_stage(dalle, tmp_path):
    def adam(groups):
        return torch.optim.Adam(groups, lr=0.5)

    model = colors_run(dalle, optimizer=adam)
    start = model.color_table
    run = trainer(tmp_path, logger=True)
    run.fit(model, loader(), loader(2))
    path = next(tmp_path.rglob("colors.json"))
    table = class_colors(path, NUM_CLASSES)
    assert table == model.color_table != start
    assert json.loads(path.read_text()) == [list(color) for color in table]
    run.save_checkpoint(tmp_path / "learned.ckpt")
    dalle_copy = make_tokenizer(tmp_path / "learned.ckpt", torch.tensor(table[:-1]) / 255)
    assert dalle_copy.fingerprint() == model.tokenizer.fingerprint()
    loaded = LearnedColors.load_from_checkpoint(tmp_path / "learned.ckpt", optimizer=adam)
    assert loaded.color_table == table
    longer = trainer(tmp_path, max_epochs=2)
    longer.fit(loaded, loader(), loader(2), ckpt_path=tmp_path / "learned.ckpt")


def test_colours_of_a_vq_change_with_its_checkpoint(tmp_path):
    stage_one = write_tokenizer(tmp_path / "vq.ckpt")
    model = colors_run(stage_one)
    with torch.no_grad():
        model.logits += 1
    learned = save(model, tmp_path / "learned.ckpt")
    colors = torch.tensor(model.color_table[:-1]) / 255
    make_tokenizer(learned, colors)
    with pytest.raises(ValueError, match="has learned other colours"):
        make_tokenizer(stage_one, colors)


def test_classes_whose_colours_have_met(dalle, tmp_path):
    """TT collapses: its checkpoint loads all the same, and GSS refuses such colours."""
    model = colors_run(dalle, colors=class_colors("arithmetic", NUM_CLASSES))
    with torch.no_grad():
        model.logits[0] = model.logits[1]
    loaded = LearnedColors.load_from_checkpoint(save(model, tmp_path / "met.ckpt"))
    assert loaded.color_table == model.color_table
    with pytest.raises(ValueError, match="one colour to two classes"):
        Maskige(loaded.color_table)


def test_tokenizers_that_teach_no_colours(tmp_path):
    with pytest.raises(GenSegError, match="majority-4, which lets no gradient through"):
        colors_run("majority-4")
    described = colors_run({"kind": "dalle", "vocabulary": 16, "hidden": 8})
    with pytest.raises(GenSegError, match="a mere description, without weights"):
        trainer(tmp_path).fit(described, loader(), loader(2))
