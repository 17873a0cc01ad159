import pytest
import torch

from lightning_genseg.methods.gss.tokenizers.dalle import DalleDVAE
from lightning_genseg.methods.gss.tokenizers.load import make_tokenizer


@pytest.fixture
def model(tmp_path):
    """Two modules in files, pickled as OpenAI's are."""
    model = DalleDVAE(16, 8)
    for name in ("encoder", "decoder"):
        torch.save(getattr(model, name), tmp_path / f"{name}.pkl")
    torch.save({"w": torch.ones(1)}, tmp_path / "plain.pkl")
    (tmp_path / "torn.pkl").write_bytes((tmp_path / "encoder.pkl").read_bytes()[:99])
    return model


def test_conversion(genseg, model, tmp_path, capsys):
    line = "convert-dalle encoder.pkl decoder.pkl dalle.safetensors"
    with pytest.raises(SystemExit) as stopped:
        genseg(line)
    assert stopped.value.code == 2
    assert "EXECUTES whatever code they contain" in capsys.readouterr().err
    assert not (tmp_path / "dalle.safetensors").exists()
    genseg(f"{line} --allow-unsafe-pickle")
    tokenizer = make_tokenizer(tmp_path / "dalle.safetensors", torch.eye(3))
    assert tokenizer.fingerprint() == model.fingerprint()
    assert model.fingerprint() in capsys.readouterr().out
    with pytest.raises(SystemExit):
        genseg(f"{line} --allow-unsafe-pickle")
    assert "output 'dalle.safetensors' exists" in capsys.readouterr().err


def test_pickles_are_never_loaded_elsewhere(model, tmp_path):
    with pytest.raises(ValueError, match=r"encoder\.pkl' holds objects .*, not only tensors"):
        make_tokenizer(tmp_path / "encoder.pkl", torch.eye(3))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ("encoder.pkl none.pkl dalle.safetensors", "decoder.pkl of OpenAI"),
        ("encoder.pkl plain.pkl dalle.safetensors", "is no pickled module"),
        ("encoder.pkl torn.pkl dalle.safetensors", "cannot be read"),
        ("encoder.pkl encoder.pkl dalle.safetensors", "does not fit DALL-E's dVAE"),
        ("encoder.pkl decoder.pkl dalle.pt", "must end in .safetensors"),
    ],
)
def test_wrong_files(files, message, model, fails, tmp_path):
    assert message in fails(f"convert-dalle {files} --allow-unsafe-pickle")
    assert not list(tmp_path.glob("dalle.*"))
