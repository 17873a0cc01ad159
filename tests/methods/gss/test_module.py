from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lightning_genseg import GSS, MaskigeTokenizer, VQOptions
from lightning_genseg.errors import GenSegError
from lightning_genseg.methods.gss.options import Decoding
from lightning_genseg.methods.gss.tokenizers.load import make_tokenizer
from lightning_genseg.ops.resize import resize_labels
from tests.contract import (
    NUM_CLASSES,
    ModuleContract,
    batch_of,
    changed,
    copied,
    loader,
    save,
    train_by_hand,
    trainer,
)
from tests.methods.gss.parts import DECODER, SMALL, VQ, trained, write_colors, write_tokenizer


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")  # inside a foreign module
class TestGSS(ModuleContract):
    steps = 40

    def make(self, **arguments: Any) -> GSS:
        return GSS(**{**SMALL, **arguments})

    def test_a_score_that_is_the_same_everywhere(self) -> None:
        assert "energy" not in self.make().computable_scores()
        with pytest.raises(GenSegError, match="energy, which is the same for every pixel with GSS"):
            self.make(anomaly_score="energy")

    def test_own_network(self) -> None:  # type: ignore[override]
        """It has no argument for one: four stages of an encoder are needed."""
        with pytest.raises(GenSegError, match="GSS takes no features: its tokens are read from"):
            self.make(features=torch.nn.Identity())


@pytest.mark.parametrize("options", [{}, {"vocabulary": 4}])
def test_tokens_that_share_classes_are_kept(tmp_path, options):
    """What each token draws comes from the checkpoint, before the tokenizer has weights again."""
    model = make({"classes": "shared", **options}, tokenizer=write_tokenizer(tmp_path / "vq.ckpt"))
    train_by_hand(model, 2)
    f = model.tokenizer.downsample
    field = model.tokenizer.decode(torch.full((1, 5, 5), 3))
    drawn = model.inverse(field).argmax(1)[0, 2 * f : 3 * f, 2 * f : 3 * f].flatten()
    assert torch.equal(model.head.drawn[3], torch.arange(f * f) * NUM_CLASSES + drawn)
    again = GSS.load_from_checkpoint(save(model, tmp_path / "model.ckpt"))
    assert torch.equal(again.head.drawn, model.head.drawn)
    image = batch_of()["image"]
    assert torch.equal(again.eval()(image), model.eval()(image))


class WithVocabulary(TestGSS):
    def make(self, **arguments: Any) -> GSS:
        return super().make(decoder={**DECODER, "vocabulary": 2}, **arguments)


class OfNoise(TestGSS):
    """An untrained network sees every image alike: here each cell has features of its own."""

    def __init__(self, decoding: Decoding) -> None:
        self.decoding = decoding

    def make(self, **arguments: Any) -> GSS:
        model = super().make(decoding=self.decoding, **arguments)
        kernel = torch.randn(
            DECODER["fused_channels"], 3, 4, 4, generator=torch.Generator().manual_seed(0)
        )
        model.extract = lambda image: (F.conv2d(5 * (image - 0.5), kernel, stride=4), None)
        return model


@pytest.mark.parametrize("decoding", ["hard", "marginal"])
def test_votes_are_averaged_in_the_same_way_everywhere(decoding):
    OfNoise(decoding).test_all_ways_to_a_mask_agree()


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
def test_a_vocabulary_is_kept_and_told_when_full(tmp_path):
    contract = WithVocabulary()
    contract.test_no_step_waits_for_a_gpu()
    model = contract.make()
    with pytest.warns(UserWarning, match="all 2 places of decoder.vocabulary are taken"):
        trainer(tmp_path).fit(model, loader(), loader())
    again = GSS.load_from_checkpoint(save(model, tmp_path / "model.ckpt"))
    assert torch.equal(again.head.place_of, model.head.place_of)
    image = batch_of()["image"]
    assert torch.equal(again.eval()(image), model.eval()(image))


# The finest of four stages is at half the resolution.
SHALLOW: dict[str, Any] = {"encoder": "resnet18", "network_options": {"encoder_depth": 4}}


def make(decoder: dict[str, Any] | None = None, **arguments: Any) -> GSS:
    return GSS(**{**SMALL, "decoder": {**DECODER, **(decoder or {})}, **arguments})


def test_options_of_its_decoder_have_names_of_their_own():
    with pytest.raises(GenSegError, match=r"GSS takes no network_options\.depth: its decoder has"):
        make(network_options={"depth": 2})


# --- what is learned ---------------------------------------------------------------------------


def one_hot_bilinear(mask, size):
    """Labels at another size as the published code finds them; 255 is a class of its own there."""
    classes = F.one_hot(torch.where(mask == 255, NUM_CLASSES, mask), NUM_CLASSES + 1)
    large = F.interpolate(classes.movedim(-1, 1).float(), size, mode="bilinear").argmax(1)
    return torch.where(large == NUM_CLASSES, 255, large)


def random_mask(size=(12, 16)):
    """A different label at every pixel; a column, and a quarter of the others, are unlabelled."""
    torch.manual_seed(0)
    mask = torch.randint(NUM_CLASSES, (2, *size))
    mask[torch.rand(mask.shape) < 0.25] = 255
    mask[:, :, -4:] = 255
    return mask


def test_twice_the_size_is_what_the_published_code_finds():
    mask = random_mask()
    large = resize_labels(mask, (24, 32))
    assert torch.equal(large, one_hot_bilinear(mask, (24, 32)))
    assert torch.equal(large, mask.repeat_interleave(2, 1).repeat_interleave(2, 2))


def majority(cell):
    return torch.bincount(cell.flatten(), minlength=NUM_CLASSES).argmax()


@pytest.mark.parametrize("tokenizer", ["majority-4", "majority-8"])
@pytest.mark.parametrize("auxiliary", ["separate", "none"])
def test_tokens_by_hand(tokenizer, auxiliary):
    """Loss of the tokens, from masks that are drawn and divided into cells by hand."""
    model = make({"auxiliary": auxiliary}, tokenizer=tokenizer).eval()
    f = model.tokenizer.downsample
    batch = {"image": torch.rand(2, 3, 12, 16), "mask": random_mask()}
    features, scores = model.extract(batch["image"])
    mask = batch["mask"].repeat_interleave(f // 4, 1).repeat_interleave(f // 4, 2)
    # Unlabelled pixels: as predicted, or in their own colour, to which some class is the nearest.
    greyest = model.inverse(model.maskige(torch.full((1, 1, 1), 255))).argmax()
    pseudo = torch.full_like(mask, int(greyest))
    if auxiliary == "separate":
        pseudo = F.interpolate(scores, mask.shape[1:], mode="bilinear").argmax(1)
    drawn = torch.where(mask == 255, pseudo, mask)
    assert torch.equal(drawn[mask != 255], mask[mask != 255])
    log_probability = model.head(features).log_softmax(1)
    terms = []
    for image, row, column in product(range(2), range(3), range(4)):
        cell = (image, slice(row * f, (row + 1) * f), slice(column * f, (column + 1) * f))
        if auxiliary == "none" or (mask[cell] != 255).any():
            terms.append(-log_probability[image, majority(drawn[cell]), row, column])
    # The last column of cells is without labels, which counts where there is an auxiliary head.
    assert len(terms) == (24 if auxiliary == "none" else 18)
    losses = model.compute_loss(batch)
    torch.testing.assert_close(losses["loss_token"], torch.stack(terms).mean())


def test_one_labelled_pixel_makes_its_cell_count():
    model = GSS(**SMALL).eval()
    image, mask = torch.rand(1, 3, 12, 16), torch.full((1, 12, 16), 255)
    assert model.compute_loss({"image": image, "mask": mask})["loss_token"] == 0
    mask[0, 6, 9] = 1
    features, scores = model.extract(image)
    seen = F.interpolate(scores, (12, 16), mode="bilinear").argmax(1)
    seen[0, 6, 9] = 1
    token = majority(seen[0, 4:8, 8:12])
    expected = -model.head(features).log_softmax(1)[0, token, 1, 2]
    batch = {"image": image, "mask": mask}
    pixel = F.interpolate(scores, (12, 16), mode="bilinear").log_softmax(1)[0, 1, 6, 9]
    # Without `avg_non_ignore` the mean is over all cells and all pixels, labelled or not.
    for model.avg_non_ignore, cells, pixels in ((True, 1, 1), (False, 12, 12 * 16)):
        losses = model.compute_loss(batch)
        torch.testing.assert_close(losses["loss_token"], expected / cells)
        torch.testing.assert_close(losses["loss_auxiliary"], -pixel / pixels)
        total = 0.8 * losses["loss_token"] + 0.2 * losses["loss_auxiliary"]
        torch.testing.assert_close(losses["loss"], total)


def test_without_a_label_there_is_nothing_to_learn():
    model = GSS(**SMALL)
    batch = {**batch_of(), "mask": torch.full((2, 48, 64), 255)}
    losses = model.compute_loss(batch)
    assert {name: loss.item() for name, loss in losses.items()} == dict.fromkeys(losses, 0.0)
    losses["loss"].backward()
    # Not None: distributed training would wait for them.
    assert all(p.grad is not None and (p.grad == 0).all() for p in model.parameters())


def test_in_parts_the_loss_is_the_same():
    plain = GSS(**SMALL).eval()
    parts = make({"logits_at_once": 100}).eval()
    parts.load_state_dict(plain.state_dict())
    results = []
    for model in (plain, parts):
        loss = model.compute_loss(batch_of())["loss"]
        loss.backward()
        results.append((loss, [p.grad for p in model.parameters()]))
    torch.testing.assert_close(results[1], results[0])
    image = batch_of()["image"]
    torch.testing.assert_close(plain(image), parts(image))


def test_bf16():
    model = GSS(**SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.compute_loss(batch_of())
        scores = model(batch_of()["image"])
    losses["loss"].backward()
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    assert scores.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in model.parameters())


# --- what is read off the picture --------------------------------------------------------------


def test_a_perfect_picture_gives_the_mask():
    model = GSS(**SMALL)
    mask = random_mask().masked_fill(random_mask() == 255, 0)
    large = resize_labels(mask, (24, 32))
    for picture in (model.maskige(mask), model.maskige(large)):
        scores = model.class_scores(picture, mask.shape[1:])
        assert torch.equal(scores.argmax(1), mask)


def test_scores_are_shares_of_votes():
    model = GSS(**SMALL)
    mask = random_mask(size=(24, 32)).masked_fill(random_mask(size=(24, 32)) == 255, 0)
    share = F.avg_pool2d(F.one_hot(mask, NUM_CLASSES).movedim(-1, 1).float(), 2)
    scores = model.class_scores(model.maskige(mask), (12, 16))
    torch.testing.assert_close(scores.softmax(1), share, rtol=0, atol=1e-5)


SIDES = torch.tensor([[0.75, 0, 0.25], [0, 0.75, 0.25]])  # of classes a, b and c


@pytest.mark.parametrize(
    "inference",
    [{"window": (8, 8), "stride": (4, 4)}, {"scales": [0.5, 1.0]}, {"flip": True}],
    ids=str,
)
def test_shares_of_windows_and_views_are_averaged(inference):
    """3/4 a + 1/4 c and 3/4 b + 1/4 c give 3/8, 3/8 and 1/4; as logarithms they would give c."""
    model = GSS(**{**SMALL, "num_classes": 3}, inference=inference)
    sides = iter(SIDES)

    def maps(image):
        shares = next(sides)[:, None, None].expand(3, *image.shape[-2:])[None]
        return {"scores": shares.clamp_min(1e-6).log()}

    model.maps = maps
    image, mask = torch.zeros(1, 3, 8, 12), torch.zeros(1, 8, 12, dtype=torch.int64)
    if "window" not in inference:
        image, mask = image[..., :8], mask[..., :8]
    scores = model.maps_at_labels({"image": image, "mask": mask})["scores"]
    both = scores[0, :, 4, 6]  # of several views they are probabilities
    shares = both.exp() if "window" in inference else both
    torch.testing.assert_close(shares, torch.tensor([0.375, 0.375, 0.25]), rtol=0, atol=1e-5)
    assert not (scores.argmax(1) == 2).any()


@pytest.mark.parametrize("inference", [None, {"scales": [0.5]}], ids=str)
def test_shares_are_enlarged(inference):
    """Not their logarithms, by which c would win between a and b."""
    model = GSS(**{**SMALL, "num_classes": 3}, inference=inference)
    model.maps = lambda image: {"scores": SIDES.T[None, :, None].clamp_min(1e-6).log()}
    image = torch.zeros(1, 3, 1, 2) if inference is None else torch.zeros(1, 3, 2, 4)
    batch = {"image": image, "mask": torch.zeros(1, 4, 8, dtype=torch.int64)}
    scores = model.maps_at_labels(batch)["scores"]
    assert not (scores.argmax(1) == 2).any()
    torch.testing.assert_close(scores.exp().sum(1), torch.ones(1, 4, 8), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("tokenizer", "stride"), [("majority-4", 4), ("majority-8", 4), ("majority-8", 8)]
)
def test_size_of_the_picture(tokenizer, stride):
    model = make({"stride": stride}, tokenizer=tokenizer).eval()
    image = torch.rand(1, 3, 50, 70)
    f = model.tokenizer.downsample
    cells = -(-50 // stride), -(-70 // stride)
    assert model.picture(image).shape == (1, 3, cells[0] * f, cells[1] * f)
    outputs = model.outputs(image)
    assert outputs["features"].shape == (1, 32, *cells)
    assert outputs["logits"].shape[2:] == (cells[0] * stride, cells[1] * stride)
    assert torch.equal(model(image), outputs["logits"][..., :50, :70])


def test_a_picture_trains_nothing():
    model = trained().train()
    before = copied(model)
    assert torch.equal(model.picture(batch_of()["image"]), model.picture(batch_of()["image"]))
    assert model.training
    assert not changed(before, model.state_dict())


def test_soft_decoding():
    model = trained().eval()
    image = batch_of()["image"]
    hard = model.picture(image)
    model.decoding = "soft"
    soft = model.picture(image)
    model.decoding = "hard"
    assert not torch.equal(hard, soft)
    probability = model.head(model.extract(image)[0]).softmax(1)
    mixed = torch.einsum("bkhw,kc->bchw", probability, model.maskige.colors[:-1])
    torch.testing.assert_close(soft[..., ::4, ::4], mixed)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.tokenizer.decode_soft(probability).dtype == torch.float32
    assert set(hard.unique().tolist()) <= set(model.maskige.colors.unique().tolist())


def test_marginal_decoding():
    """Where a token is a class its probability is that of the class; tokens share it otherwise."""
    model = trained().eval()
    image = batch_of()["image"]
    model.decoding = "marginal"
    features = model.extract(image)[0]
    probability = model.head(features).softmax(1)
    enlarged = probability.repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(model.expected_votes(features), enlarged)
    torch.testing.assert_close(model.outputs(image)["logits"].exp(), enlarged.clamp_min(1e-6))


def test_marginal_decoding_in_mixed_precision():
    model = trained().eval()
    model.decoding = "marginal"
    with torch.autocast("cpu", torch.bfloat16):
        votes = model.expected_votes(torch.randn(1, 32, 2, 3))
    assert votes.dtype == torch.float32
    torch.testing.assert_close(votes.sum(1), torch.ones_like(votes[:, 0]), rtol=0, atol=1e-6)


def test_marginal_decoding_adds_up_tokens():
    """Of a learned tokenizer several tokens draw a class at a pixel, each with its probability."""
    model = make(tokenizer={"kind": "vq", "levels": (3, 2), "channels": 8}).eval()
    torch.nn.init.normal_(model.tokenizer.decoder[-1].weight, std=3)
    features = torch.randn(1, 32, 2, 3)
    votes = model.expected_votes(features)
    probability = model.head(features).softmax(1)
    expected = torch.zeros_like(votes)
    for token in range(6):
        field = model.tokenizer.decode(torch.full((1, 5, 5), token))[:, :, 8:12, 8:12]
        drawn = F.one_hot(model.inverse(field).argmax(1), NUM_CLASSES).movedim(-1, 1)
        expected += drawn.repeat(1, 1, 2, 3) * probability[:, token, None].repeat_interleave(
            4, 2
        ).repeat_interleave(4, 3)
    assert len(expected[0].argmax(0).unique()) > 1
    torch.testing.assert_close(votes, expected)


def test_the_printed_inverse():
    """It is a choice, not a good one: colours inside the cube are not found."""
    model = make(num_classes=60, inverse="lstsq").eval()
    mask = torch.arange(60).view(1, 6, 10)
    found = model.class_scores(model.maskige(mask), (6, 10)).argmax(1)
    assert 0 < (found == mask).sum() < 30
    assert model(batch_of()["image"]).isfinite().all()


# --- what is frozen, and what a checkpoint holds -----------------------------------------------


def test_the_tokenizer_is_frozen(tmp_path):
    model = GSS(**SMALL, tokenizer=write_tokenizer(tmp_path / "vq.ckpt"))
    before = copied(model.tokenizer)
    groups = model.parameter_groups()
    optimised = {id(p) for group in groups for p in group["params"]}
    assert not optimised & {id(p) for p in model.tokenizer.parameters()}
    assert optimised == {id(p) for p in [*model.features.parameters(), *model.head.parameters()]}
    assert {group["name"] for group in groups} == {"encoder", "head"}
    assert list(model.tokenizer.parameters())
    train_by_hand(model.train(), 2)
    assert not any(part.training for part in model.tokenizer.modules())
    assert model.features.training
    for name, value in model.tokenizer.state_dict().items():
        assert torch.equal(value, before[name])
    stored = [name for name in model.state_dict() if "tokenizer" in name or "maskige" in name]
    assert len(stored) == len(before) + 1


@pytest.mark.parametrize("argument", ["tokenizer", "colors"])
def test_a_checkpoint_needs_no_other_file(argument, tmp_path):
    file = {"tokenizer": write_tokenizer, "colors": write_colors}[argument](tmp_path / "file.json")
    model = GSS(**SMALL, **{argument: file})
    save(model, tmp_path / "gss.ckpt")
    file.unlink()
    saved = torch.load(tmp_path / "gss.ckpt", weights_only=True)
    assert saved["tokenizer"] == model.tokenizer.config()
    image = batch_of()["image"]
    for name in ("gss.ckpt", "again.ckpt"):
        loaded = GSS.load_from_checkpoint(tmp_path / name).eval()
        assert torch.equal(loaded(image), model.eval()(image))
        assert torch.equal(loaded.picture(image), model.picture(image))
        assert loaded.fingerprints() == model.fingerprints()
        save(loaded, tmp_path / "again.ckpt")
    loaded.on_fit_start()  # has its weights


def test_a_majority_checkpoint_is_a_tokenizer_for_other_classes(tmp_path):
    path = save(make(num_classes=8, tokenizer="majority-8"), tmp_path / "8.ckpt")
    colors = GSS(**SMALL).maskige.colors[:-1]
    tokenizer = make_tokenizer(path, colors)
    assert (tokenizer.downsample, tokenizer.codebook_size) == (8, NUM_CLASSES)
    assert torch.equal(tokenizer.colors, colors)


def test_colors_that_floating_point_decides_are_kept(tmp_path):
    model = GSS(**SMALL, colors="repulsion")
    path = save(model, tmp_path / "gss.ckpt")
    saved = torch.load(path, weights_only=True)["hyper_parameters"]["colors"]
    assert [list(c) for c in saved] == (model.maskige.colors * 255).round().long().tolist()


def test_another_tokenizer_or_other_colors_are_refused(tmp_path):
    first = write_tokenizer(tmp_path / "first.ckpt")
    with pytest.raises(ValueError, match="has learned other colours"):
        GSS(**SMALL, tokenizer=first, colors="random")
    second = write_tokenizer(tmp_path / "second.ckpt", seed=1)
    path = save(GSS(**SMALL, tokenizer=first), tmp_path / "gss.ckpt")
    assert GSS.load_from_checkpoint(path, tokenizer=first, decoding="soft").decoding == "soft"
    with pytest.raises(ValueError, match=r"another tokenizer .*: use the same, or train again"):
        GSS.load_from_checkpoint(path, tokenizer=second)
    path = save(GSS(**SMALL), tmp_path / "majority.ckpt")
    with pytest.raises(ValueError, match=r"with other colors .*: use the same, or train again"):
        GSS.load_from_checkpoint(path, colors="random")
    with pytest.raises(ValueError, match="with other colors"):
        trainer(tmp_path).validate(GSS(**SMALL, colors="random"), loader(2), ckpt_path=path)


def test_a_tokenizer_without_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a mere description, without weights"):
        trainer(tmp_path).fit(GSS(**SMALL, tokenizer=VQ), loader(), loader(2))
    GSS(**SMALL, tokenizer={"kind": "majority", "downsample": 4}).on_fit_start()


@pytest.mark.parametrize(
    "model",
    [GSS(**SMALL), MaskigeTokenizer(NUM_CLASSES, VQOptions(channels=8))],
    ids=["GSS", "tokenizer"],
)
@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_only_float32(model, precision, tmp_path):
    with pytest.raises(ValueError, match=f"trainer.precision is {precision}, but mixtures"):
        trainer(tmp_path, precision=precision).validate(model, loader(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decoder": {"dropout": 1.0}}, "dropout is 1.0; it must be at least 0 and less than 1"),
        ({"decoder": {"fused_channels": 40}}, "were given 40: choose a multiple of 32"),
        ({"tokenizer": "no.ckpt"}, r"tokenizer 'no\.ckpt' is no file"),
        ({"tokenizer": "majority-3"}, "are 3 pixels wide, no whole part of decoder.stride 4"),
        ({"colors": Path("no.json")}, r"colors 'no\.json' is no file"),
        ({"colors": "cityscapes"}, "is for 19 classes"),
        ({**SHALLOW, "decoder": {"stride": 8}}, "stride is 8 and the stages of .* lead to 4"),
    ],
    ids=str,
)
def test_what_does_not_go_together(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_auxiliary_scores_lie_where_the_tokens_do():
    """Both maps are brought to a quarter."""
    model = make({"depth": 0}, **SHALLOW)
    image = torch.zeros(1, 3, 64, 96)
    image[..., 64:] = 1
    features, auxiliary = model.eval().extract(image)
    assert features.shape[-2:] == auxiliary.shape[-2:] == (16, 24)
    for maps in (features, auxiliary):  # the edge is at two thirds of the width in both
        change = maps.diff(dim=3).abs().sum((0, 1, 2))
        assert 14 <= change.argmax() <= 17
