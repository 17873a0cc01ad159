"""The authors' own tokens, losses, gradients and shares (see tests/golden/make.py)."""

import pytest
import torch
from safetensors.torch import save_file

from lightning_genseg import GSS
from lightning_genseg.networks.mla import MLADecoder
from lightning_genseg.networks.swin import SwinBlocks
from tests.golden.compare import close_all

SIZES = {"stride": 4, "depth": 2, "level_channels": 6, "fused_channels": 32, "head_channels": 16}
STAGES = (4, 8, 16, 32)
ORDER = (1, 0, 2, 3)  # of our levels in theirs: strides 8, 4, 16, 32
HEADS = ["mla_separate", "mla_shared"]


@pytest.fixture(scope="module")
def golden(golden_of):
    return golden_of("gss")


@pytest.fixture(scope="module")
def tokenizer(golden, tmp_path_factory):
    """A file of their dVAE; where its weights are left out, of another."""
    state = {
        name.removeprefix("dvae/weights/"): value.contiguous()
        for name, value in golden.items()
        if name.startswith("dvae/weights/")
    }
    if not state:
        return {"kind": "dalle", "vocabulary": 64, "hidden": 8}
    path = tmp_path_factory.mktemp("dvae") / "dvae.safetensors"
    save_file(state, path)
    return path


def colors(golden):
    return [tuple(color) for color in golden["colors"].tolist()]


def whole(golden, name):
    if not any(key.startswith(name) for key in golden):
        pytest.skip("in the whole file only")


def our_names(theirs, shared):
    """Their names of a head's weights in ours."""
    names = {
        "conv_before_seg": "head.expand",
        "conv_seg": "head.classifier",
        "conv_seg_pixel": "features.decoder.auxiliary" + ("" if shared else ".1"),
        "fusion_conv": "features.decoder.merge.fuse",
        "fusion_conv_pixel": "features.decoder.auxiliary.0.fuse",
        "swin_ln": "features.decoder.blocks.norm",
    }
    for index, level in enumerate(ORDER):
        names[f"convs.{index}"] = f"features.decoder.merge.levels.{level}"
        names[f"convs_pixel.{index}"] = f"features.decoder.auxiliary.0.levels.{level}"
    inside = {"attn.w_msa": "attn", "ffn.layers.0.0": "mlp.0", "ffn.layers.1": "mlp.3"}
    for index in range(2):
        for part in ("norm1", "norm2", *inside):
            there = f"transformer_block.blocks.{index}.{part}"
            names[there] = f"features.decoder.blocks.blocks.{index}.{inside.get(part, part)}"
    for part in (".attn.w_msa.qkv", ".attn.w_msa.proj"):
        for index in range(2):
            ours = f"features.decoder.blocks.blocks.{index}"
            names[f"transformer_block.blocks.{index}{part}"] = ours + part.replace(".w_msa", "")
    layer, _, leaf = theirs.rpartition(".")
    if layer in names:
        return f"{names[layer]}.{leaf}"
    layer, _, part = layer.rpartition(".")
    return f"{names[layer]}.{ {'conv': 0, 'bn': 1}[part] }.{leaf}"


def authors_head(golden, name, tokenizer):
    """A GSS with their weights, which sees the stages of the file whatever the image is."""
    auxiliary = name.removeprefix("mla_")
    model = GSS(
        7,
        encoder="tu-test_resnet",
        decoder={**SIZES, "auxiliary": auxiliary, "dropout": 0.0},
        colors=colors(golden),
        tokenizer=tokenizer,
    )
    stages = [golden[f"mla/stage_{stride}"].clone().requires_grad_() for stride in STAGES]
    model.features.decoder = MLADecoder(
        [stage.shape[1] for stage in stages],
        level_channels=6,
        decoder_channels=32,
        depth=2,
        auxiliary=auxiliary,
        num_classes=7,
    )
    # Theirs has one attention head of 32 channels, as ours; the rest of the block is torchvision's.
    assert isinstance(model.features.decoder.blocks, SwinBlocks)
    state = model.state_dict()
    loaded = set()
    for key, value in golden.items():
        if key.startswith(f"{name}/weights/") and not key.endswith("position_index"):
            ours = our_names(key.removeprefix(f"{name}/weights/"), auxiliary == "shared")
            if ours.endswith("fuse.0.weight"):  # of all levels, one after the other
                value = torch.cat([value.chunk(4, 1)[level] for level in ORDER], 1)
            state[ours] = value.view(state[ours].shape)
            loaded.add(ours)
    left = set(model.state_dict()) - loaded
    own = ("features.encoder.", "tokenizer.", "maskige.")
    also = ("num_batches_tracked", "relative_position_index")
    assert not [key for key in left if not key.startswith(own) and not key.endswith(also)]
    model.load_state_dict(state)
    model.extract = lambda image: model.features.decoder(stages)
    return model, stages


def test_the_dvae(golden, tokenizer):
    whole(golden, "dvae/")
    dalle = GSS(7, encoder="tu-test_resnet", colors=colors(golden), tokenizer=tokenizer).tokenizer
    picture = golden["dvae/picture"]
    mine = {
        "picture": picture,
        "token_logits": dalle.logits(picture),
        "tokens": dalle.encode(picture),
        "tokens_to_decode": golden["dvae/tokens_to_decode"],
        "reconstruction": dalle.decode(golden["dvae/tokens_to_decode"].long()),
    }
    there = {key: x for key, x in golden.items() if "dvae/weights" not in key}
    close_all(there, "dvae/", mine)


@pytest.mark.parametrize("name", HEADS)
def test_prediction(golden, tokenizer, name):
    whole(golden, f"{name}/eval/")
    model, _ = authors_head(golden, name, tokenizer)
    model.eval()
    features = model.extract(None)[0]
    picture = model.paint(features)
    mine = {
        "token_logits": model.head(features),
        "tokens": model.head.predict(features),
        "nearest_class": model.inverse(picture).argmax(1),
        "class_shares": model.class_scores(picture, (64, 96))[:1].exp(),
    }
    close_all(golden, f"{name}/eval/", mine)


@pytest.mark.parametrize("name", HEADS)
def test_losses_and_gradients(golden, tokenizer, name, monkeypatch):
    whole(golden, f"{name}/weights/")
    model, stages = authors_head(golden, name, tokenizer)
    mine, cross_entropy = {}, model.head.cross_entropy
    whole_tokens = f"{name}/train/token_targets" if isinstance(tokenizer, dict) else None

    def spy(features, tokens, counts):
        if whole_tokens:  # their dVAE made these
            tokens = golden[whole_tokens].long().clamp_max(63)
        mine["token_targets"] = tokens.masked_fill(~counts, 64)
        mine["cells_that_count"] = counts
        return cross_entropy(features, tokens, counts)

    monkeypatch.setattr(model.head, "cross_entropy", spy)
    batch = {"image": torch.zeros(2, 3, 64, 96), "mask": golden["mla/labels"].long()}
    # Batch statistics: the same features at every call.
    for part in ("labelled", "all"):
        model.avg_non_ignore = part == "labelled"
        losses = model.compute_loss(batch)
        for term in ("token", "auxiliary"):
            mine[f"loss_{term}_mean_{part}"] = losses[f"loss_{term}"]
        if part == "labelled":
            mine["loss_total"] = losses["loss"]
            gradients = torch.autograd.grad(losses["loss"], stages)
            mine |= {f"grad_stage_{s}": x for s, x in zip(STAGES, gradients, strict=True)}
    tolerances = {key: 2e-5 for key in mine if key.startswith("grad")}
    close_all(golden, f"{name}/train/", mine, 5e-6, tolerances)


def test_the_authors_means_are_the_default():
    assert GSS(7, encoder="tu-test_resnet").avg_non_ignore


def test_windows(golden):
    """Through `predict_maps`: two windows, whose pictures are those of the file."""
    model = GSS(
        7,
        encoder="tu-test_resnet",
        decoder=SIZES,
        colors=colors(golden),
        inference={"window": (16, 16), "stride": (8, 8)},
    )
    pictures = iter(golden["windows/pictures"].split(1))
    shares = []

    def maps(image):
        scores = model.class_scores(next(pictures), image.shape[-2:])
        shares.append(scores.exp())
        return {"scores": scores}

    model.maps = maps
    merged = model.predict_maps(torch.zeros(1, 3, 16, 24))["scores"].exp()
    ties = golden["windows/is_tie"].bool()
    classes = merged.argmax(1)
    assert torch.equal(classes[~ties], golden["windows/merged_class"].long()[~ties])
    mine = {
        "pictures": golden["windows/pictures"],
        "class_shares_of_each_window": torch.cat(shares),
        "merged_class_shares": merged,
        "merged_class": torch.where(ties, golden["windows/merged_class"].long(), classes),
        "is_tie": golden["windows/is_tie"],
    }
    close_all(golden, "windows/", mine)
