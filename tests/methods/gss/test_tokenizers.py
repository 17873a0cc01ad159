import re
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from lightning_genseg import MaskigeTokenizer, VQOptions
from lightning_genseg.methods.gss.colors import class_colors
from lightning_genseg.methods.gss.maskige import Maskige, NearestColor
from lightning_genseg.methods.gss.tokenizers.dalle import DalleDVAE
from lightning_genseg.methods.gss.tokenizers.load import make_tokenizer
from lightning_genseg.methods.gss.tokenizers.majority import CellMajority
from lightning_genseg.methods.gss.tokenizers.reconstruction import reconstruct
from lightning_genseg.methods.gss.tokenizers.vq import MaskigeVQ
from tests.contract import save

COLORS = torch.tensor(class_colors("lattice", 5)[:-1]) / 255
CONFIGS = [
    {"kind": "majority", "downsample": 4},
    {"kind": "vq", "downsample": 4, "levels": [4, 3, 2], "channels": 8, "blocks": 1},
    {"kind": "vq", "downsample": 8, "levels": [5, 5], "channels": 8, "blocks": 0},
    {"kind": "dalle", "vocabulary": 16, "hidden": 8},
]


@pytest.fixture(params=CONFIGS, ids=str)
def tokenizer(request):
    made = make_tokenizer(request.param, COLORS)
    assert made.config() == request.param
    assert not made.training
    assert not any(parameter.requires_grad for parameter in made.parameters())
    return made


def test_sizes(tokenizer):
    f = tokenizer.downsample
    tokens = tokenizer.encode(torch.rand(2, 3, 3 * f - 1, 2 * f + 1))
    assert tokens.shape == (2, 3, 3)
    assert tokens.dtype == torch.int64
    assert 0 <= tokens.min() <= tokens.max() < tokenizer.codebook_size
    everything = torch.arange(tokenizer.codebook_size).view(1, 1, -1)
    picture = tokenizer.decode(everything)
    assert picture.shape == (1, 3, f, f * tokenizer.codebook_size)
    assert 0 <= picture.min() <= picture.max() <= 1


def test_soft_decoding_of_certain_tokens(tokenizer):
    tokens = torch.randint(tokenizer.codebook_size, (2, 3, 4))
    certain = F.one_hot(tokens, tokenizer.codebook_size).movedim(-1, 1).float()
    torch.testing.assert_close(tokenizer.decode_soft(certain), tokenizer.decode(tokens))


def test_pictures_of_single_tokens(tokenizer):
    f, last = tokenizer.downsample, tokenizer.codebook_size - 1
    pictures = tokenizer.token_pictures()
    assert pictures.shape == (tokenizer.codebook_size, 3, f, f)
    field = tokenizer.decode(torch.full((1, 5, 5), last))
    torch.testing.assert_close(pictures[last], field[0, :, 2 * f : 3 * f, 2 * f : 3 * f])
    assert tokenizer.token_pictures() is pictures
    tokenizer.load_state_dict(tokenizer.state_dict())
    assert tokenizer.token_pictures() is not pictures


def test_config_builds_one_like_it(tokenizer):
    again = make_tokenizer(tokenizer.config(), COLORS)
    again.load_state_dict(tokenizer.state_dict())
    assert again.fingerprint() == tokenizer.fingerprint()
    for tensor in again.state_dict().values():
        tensor += 1e-3
    assert again.fingerprint() != tokenizer.fingerprint()


def test_autocast_changes_no_token(tokenizer):
    picture = torch.rand(1, 3, 16, 24)
    tokens = tokenizer.encode(picture)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer.encode(picture), tokens)
        decoded = tokenizer.decode(tokens)
    assert torch.equal(decoded, tokenizer.decode(tokens))


def test_gradients_pass(tokenizer):
    picture = torch.rand(1, 3, 16, 24, requires_grad=True)
    if isinstance(tokenizer, CellMajority):
        with pytest.raises(NotImplementedError, match="CellMajority lets no gradient through"):
            tokenizer.straight_through(picture)
        return
    result = tokenizer.straight_through(picture)
    assert result.shape == picture.shape
    result.square().sum().backward()
    assert picture.grad.isfinite().all()
    assert picture.grad.abs().sum() > 0


def test_cell_majority():
    maskige = Maskige(class_colors("lattice", 5))
    mask = torch.randint(5, (2, 12, 20))
    tokens = CellMajority(COLORS).encode(maskige(mask))
    cells = mask.unfold(1, 4, 4).unfold(2, 4, 4).flatten(3)
    counts = (cells[..., None] == torch.arange(5)).sum(3)
    assert torch.equal(counts.gather(3, tokens[..., None])[..., 0], counts.amax(3))
    assert CellMajority(COLORS, 4).fingerprint() != CellMajority(COLORS, 8).fingerprint()


def test_every_code_of_a_vq_is_its_own_token():
    """Rounding what encodes to a code gives its number; training and decoding see one code."""
    tokenizer = MaskigeVQ(VQOptions(levels=(4, 3, 2), channels=4))
    assert len(tokenizer.codes.unique(dim=0)) == 24
    assert tokenizer.codes.abs().max() == 1
    tokenizer.encoder = torch.nn.Identity()
    squashed = tokenizer.codes.clamp(-0.99, 0.99).T[None, :, None]  # before: 2 x - 1 and tanh
    tokens = tokenizer._encode((squashed.atanh() + 1) / 2)
    assert torch.equal(tokens[0, 0], torch.arange(24))
    tokenizer = MaskigeVQ(VQOptions(levels=(4, 3, 2), channels=4))
    picture = torch.rand(1, 3, 8, 12)
    torch.testing.assert_close(tokenizer(picture), tokenizer.decode(tokenizer.encode(picture)))


def test_vq_tokens_are_local():
    """A cell reaches as many rings of cells as there are blocks."""
    tokenizer = MaskigeVQ(VQOptions(levels=(8, 8, 8), channels=16, blocks=1))
    for block in (tokenizer.encoder[2], tokenizer.decoder[1]):
        torch.nn.init.normal_(block.mix.weight)
    picture = torch.rand(1, 3, 28, 28, requires_grad=True)
    tokenizer._digits(picture)[0, 3, 3].sum().backward()
    rows = picture.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert (rows.min(), rows.max()) == (8, 19)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"kind": "vq", "downsample": 0}, "downsample is 0; it must be at least 1"),
        ({"kind": "vq", "levels": [8, 1]}, "levels is 1; it must be at least 2"),
        ({"kind": "vq", "levels": []}, "levels is empty"),
        ({"kind": "vq", "channels": 0}, "channels is 0; it must be at least 1"),
        ({"kind": "vq", "hidden": 8}, r"give kind \(majority, vq, dalle\) and its sizes"),
        ({"kind": "dalle", "hidden": 6}, "hidden is 6; it must be a multiple of 4"),
        ({"kind": "majority", "downsample": 0}, "downsample is 0; it must be at least 1"),
        ({"kind": "majority", "hidden": 8}, r"give kind \(majority, vq, dalle\) and its sizes"),
        ({"kind": "vqgan"}, r"give kind \(majority, vq, dalle\) and its sizes"),
        ({"levels": [3, 3]}, r"give kind \(majority, vq, dalle\) and its sizes"),
        ("majority", "'majority' is no file: give majority-4"),
    ],
    ids=str,
)
def test_wrong_sources(source, message):
    with pytest.raises(ValueError, match=message):
        make_tokenizer(source, COLORS)


# --- DALL-E ------------------------------------------------------------------------------------


def test_dalle_has_the_published_parameters():
    with torch.device("meta"):
        tokenizer = DalleDVAE()
    for part, count, tensors in (("encoder", 53_786_240, 74), ("decoder", 43_829_766, 76)):
        state = getattr(tokenizer, part).state_dict()
        assert sum(tensor.numel() for tensor in state.values()) == count
        layers = {"input", "output.conv"}
        for g in range(1, 5):
            convs = product((1, 2), range(1, 5))
            layers |= {f"group_{g}.block_{b}.res_path.conv_{i}" for b, i in convs}
            if g > 1 or part == "decoder":
                layers.add(f"group_{g}.block_1.id_path")
        assert set(state) == {f"blocks.{layer}.{leaf}" for layer in layers for leaf in "wb"}
        assert len(state) == tensors
    assert tokenizer.encoder.blocks.input.w.shape == (256, 3, 7, 7)
    assert tokenizer.encoder.blocks.output.conv.w.shape == (8192, 2048, 1, 1)
    assert tokenizer.decoder.blocks.input.w.shape == (128, 8192, 1, 1)
    picture = torch.empty(1, 3, 64, 96, device="meta")
    assert tokenizer.logits(picture).shape == (1, 8192, 8, 12)
    tokens = torch.empty(1, 8192, 8, 12, device="meta")
    assert tokenizer.decoder.blocks(tokens).shape == (1, 6, 64, 96)


def test_dalle_by_hand():
    """Its range is mapped to 0.1..0.9 and back; looking tokens up is multiplying one-hot ones."""
    tokenizer = DalleDVAE(16, 8)
    picture = torch.rand(1, 3, 16, 24)
    scores = tokenizer.encoder.blocks(0.1 + 0.8 * picture)
    tokens = scores.argmax(1)
    assert torch.equal(tokenizer.encode(picture), tokens)
    out = tokenizer.decoder.blocks(F.one_hot(tokens, 16).movedim(-1, 1).float())
    expected = ((out[:, :3].sigmoid() - 0.1) / 0.8).clamp(0, 1)
    torch.testing.assert_close(tokenizer.decode(tokens), expected)


def layouts(state, folder):
    """The same weights as OpenAI, GSS and transformers (FLAVA) name them."""
    save_file(state, folder / "openai.safetensors")
    inside = {f"decode_head.d_vae.{key}": value for key, value in state.items()}
    torch.save({"state_dict": {"backbone.w": torch.ones(1), **inside}}, folder / "gss.pth")
    other = {}
    for key, value in state.items():
        key = key.replace(".block_", ".group.block_").replace("res_path.", "res_path.path.")
        other[re.sub(r"\.([wb])$", lambda m: {"w": ".weight", "b": ".bias"}[m[1]], key)] = value
    torch.save(other, folder / "flava.bin")
    return sorted(folder.iterdir())


def test_dalle_weights_by_any_name(tmp_path):
    tokenizer = DalleDVAE(16, 8)
    for path in layouts(tokenizer.state_dict(), tmp_path):
        assert make_tokenizer(path, COLORS).fingerprint() == tokenizer.fingerprint()


def test_files_without_a_tokenizer(tmp_path):
    state = DalleDVAE(16, 8).state_dict()
    encoder = {key: value for key, value in state.items() if key.startswith("encoder.")}
    save_file(encoder, tmp_path / "encoder.safetensors")
    state.pop("encoder.blocks.group_2.block_1.id_path.w")
    save_file(state, tmp_path / "part.safetensors")
    (tmp_path / "broken.ckpt").write_bytes(b"nothing")
    for name, message in (
        ("encoder.safetensors", "' holds none: give .* encoder and decoder"),
        ("part.safetensors", "' does not fit DALL-E's dVAE"),
        ("broken.ckpt", "' is (truncated|not a checkpoint)"),
    ):
        with pytest.raises(ValueError, match=name + message):
            make_tokenizer(tmp_path / name, COLORS)


# --- of a run ----------------------------------------------------------------------------------


def test_tokenizer_of_a_checkpoint(tmp_path):
    model = MaskigeTokenizer(5, VQOptions(levels=(4, 3), channels=8))
    path = save(model, tmp_path / "vq.ckpt")
    assert make_tokenizer(str(path), COLORS).fingerprint() == model.tokenizer.fingerprint()
    assert make_tokenizer(path, COLORS[[3, 1]]).codebook_size == 12  # fewer classes, its colours
    others = torch.tensor(class_colors("random", 5)[:-1]) / 255
    with pytest.raises(ValueError, match=r"vq\.ckpt' has learned other colours, without \(\d+, "):
        make_tokenizer(path, others)


# --- there and back ----------------------------------------------------------------------------


def test_reconstruction_at_other_scales():
    maskige = Maskige(class_colors("lattice", 5))
    tokenizer, inverse = CellMajority(COLORS, 4), NearestColor(COLORS)
    mask = torch.randint(5, (1, 4, 6)).repeat_interleave(4, 1).repeat_interleave(4, 2)
    for scale, cells in ((1.0, (4, 6)), (2.0, (8, 12)), (0.5, (2, 3))):
        found = reconstruct(mask, maskige, tokenizer, inverse, scale)
        assert found.tokens.shape[1:] == cells
        assert found.scores.shape == (1, 5, 16, 24)
        assert torch.equal(found.scores.argmax(1), mask) == (scale >= 1)
    # At twice the size a cell of 4 x 4 sees 2 x 2 pixels: finer than at its own.
    fine = torch.randint(5, (1, 8, 12)).repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert torch.equal(reconstruct(fine, maskige, tokenizer, inverse, 2.0).scores.argmax(1), fine)
    assert not torch.equal(reconstruct(fine, maskige, tokenizer, inverse).scores.argmax(1), fine)
    odd = torch.full((1, 7, 9), 255)
    assert reconstruct(odd, maskige, tokenizer, inverse).scores.shape == (1, 5, 7, 9)
