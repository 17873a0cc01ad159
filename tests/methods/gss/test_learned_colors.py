import json

import pytest
import torch

from lightning_genseg import LearnedColors, MaskigeTokenizer
from lightning_genseg.methods.gss.colors import class_colors
from lightning_genseg.methods.gss.maskige import Maskige
from lightning_genseg.methods.gss.tokenizers.dalle import DalleDVAE
from lightning_genseg.methods.gss.tokenizers.load import make_tokenizer
from tests.contract import NUM_CLASSES, batch_of, loader, trainer


@pytest.fixture(scope="module")
def dalle(tmp_path_factory):
    """Weights of a small dVAE, random."""
    path = tmp_path_factory.mktemp("dalle") / "dalle.pth"
    torch.manual_seed(0)
    torch.save(DalleDVAE(16, 8).state_dict(), path)
    return path


def make(tokenizer, **arguments):
    return LearnedColors(NUM_CLASSES, tokenizer, **{"width": 8, **arguments})


@pytest.mark.parametrize("variant", ["tf", "tt"])
def test_colours_are_learned_and_nothing_else(dalle, variant):
    model = make(dalle, variant=variant)
    before = model.tokenizer.fingerprint()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.5)
    table = model.color_table
    losses = model.compute_loss(batch_of())
    losses["loss"].backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name == "logits" or name.startswith("inverse."))
    assert (model.logits.grad.abs().sum(1) > 0).all()
    optimizer.step()
    assert model.color_table[:-1] != table[:-1]
    assert model.color_table[-1] == table[-1]
    assert model.tokenizer.fingerprint() == before


def test_the_closed_form_inverse_gives_no_gradient(dalle):
    """Of `tf` only the tokenizer's reconstruction and the distance to it move the colours."""
    model = make(dalle)
    model.tokenizer.straight_through = lambda picture, temperature: picture.detach()
    losses = model.compute_loss(batch_of())
    assert not losses["loss_cross_entropy"].requires_grad
    assert losses["loss_distance"].requires_grad


def test_fit_leaves_colours_for_the_next_stage(dalle, tmp_path):
    model = make(dalle, optimizer=lambda groups: torch.optim.Adam(groups, lr=0.5))
    start = model.color_table
    run = trainer(tmp_path, logger=True)
    run.fit(model, loader(), loader(2))
    assert {"train_loss", "train_loss_distance", "val_mIoU"} <= set(run.callback_metrics)
    path = next(tmp_path.rglob("colors.json"))
    table = class_colors(path, NUM_CLASSES)
    assert table == model.color_table != start
    assert json.loads(path.read_text()) == [list(color) for color in table]

    run.save_checkpoint(tmp_path / "learned.ckpt")
    dalle_copy = make_tokenizer(tmp_path / "learned.ckpt", torch.tensor(table[:-1]) / 255)
    assert dalle_copy.fingerprint() == model.tokenizer.fingerprint()
    loaded = LearnedColors.load_from_checkpoint(tmp_path / "learned.ckpt")
    assert loaded.color_table == table
    trainer(tmp_path, max_epochs=2).fit(
        loaded, loader(), loader(2), ckpt_path=tmp_path / "learned.ckpt"
    )


def test_colours_of_a_vq_change_with_its_checkpoint(tmp_path):
    stage_one = MaskigeTokenizer(NUM_CLASSES, levels=[4, 3], channels=8)
    run = trainer(tmp_path)
    run.strategy.connect(stage_one)
    run.save_checkpoint(tmp_path / "vq.ckpt")
    model = make(tmp_path / "vq.ckpt")
    with torch.no_grad():
        model.logits += 1
    run = trainer(tmp_path)
    run.strategy.connect(model)
    run.save_checkpoint(tmp_path / "learned.ckpt")
    colors = torch.tensor(model.color_table[:-1]) / 255
    make_tokenizer(tmp_path / "learned.ckpt", colors)
    with pytest.raises(ValueError, match="has learned other colours"):
        make_tokenizer(tmp_path / "vq.ckpt", colors)


def test_classes_whose_colours_have_met(dalle, tmp_path):
    """TT collapses: its checkpoint can be loaded all the same, and GSS says what is wrong with such colours."""
    model = make(dalle, colors=class_colors("arithmetic", NUM_CLASSES))
    with torch.no_grad():
        model.logits[0] = model.logits[1]
    run = trainer(tmp_path)
    run.strategy.connect(model)
    run.save_checkpoint(tmp_path / "met.ckpt")
    loaded = LearnedColors.load_from_checkpoint(tmp_path / "met.ckpt")
    assert loaded.color_table == model.color_table
    with pytest.raises(ValueError, match="one colour to two classes"):
        Maskige(loaded.color_table)


def test_ignored_pixels_do_not_count(dalle):
    losses = make(dalle).compute_loss({"mask": torch.full((2, 16, 24), 255)})
    losses["loss"].backward()
    assert losses["loss"] == 0


def test_refusals(dalle, tmp_path):
    with pytest.raises(ValueError, match="tokenizer is majority-4, which lets no gradient through"):
        make("majority-4")
    with pytest.raises(ValueError, match="gumbel_temperature is 0 but must be positive"):
        make(dalle, gumbel_temperature=0)
    described = make({"kind": "dalle", "vocabulary": 16, "hidden": 8})
    with pytest.raises(ValueError, match="a mere description, without weights"):
        trainer(tmp_path).fit(described, loader(), loader(2))
    with pytest.raises(ValueError, match="a LearnedColors knows masks only"):
        trainer(tmp_path).predict(make(dalle), loader(2))
