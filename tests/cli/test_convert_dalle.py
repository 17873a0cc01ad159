import pytest
import torch

from lightning_genseg.cli.convert_dalle import main
from lightning_genseg.methods.gss.tokenizers.dalle import DalleDVAE
from lightning_genseg.methods.gss.tokenizers.load import make_tokenizer


@pytest.fixture
def pickles(tmp_path):
    """Whole modules, pickled as OpenAI's are."""
    model = DalleDVAE(16, 8)
    for name in ("encoder", "decoder"):
        torch.save(getattr(model, name), tmp_path / f"{name}.pkl")
    return model, [str(tmp_path / name) for name in ("encoder.pkl", "decoder.pkl")]


def test_conversion(pickles, tmp_path, capsys):
    model, files = pickles
    output = tmp_path / "dalle.safetensors"
    with pytest.raises(SystemExit) as stopped:
        main([*files, str(output)])
    assert stopped.value.code == 2
    assert "EXECUTES whatever code they contain" in capsys.readouterr().err
    assert not output.exists()
    main([*files, str(output), "--allow-unsafe-pickle"])
    tokenizer = make_tokenizer(output, torch.eye(3))
    assert tokenizer.fingerprint() == model.fingerprint()
    assert model.fingerprint() in capsys.readouterr().out


def test_pickles_are_never_loaded_elsewhere(pickles):
    with pytest.raises(ValueError, match=r"encoder\.pkl' cannot be read as a checkpoint"):
        make_tokenizer(pickles[1][0], torch.eye(3))


def test_wrong_files(pickles, tmp_path, capsys):
    _, (encoder, decoder) = pickles
    output = str(tmp_path / "dalle.safetensors")
    torch.save({"w": torch.ones(1)}, tmp_path / "plain.pkl")
    for args, message in (
        ((encoder, str(tmp_path / "none.pkl"), output), "decoder.pkl of OpenAI"),
        ((encoder, str(tmp_path / "plain.pkl"), output), "is no pickled module"),
        ((encoder, encoder, output), "does not fit DALL-E's dVAE"),
        ((encoder, decoder, str(tmp_path / "dalle.pt")), "must end in .safetensors"),
    ):
        with pytest.raises(SystemExit):
            main([*args, "--allow-unsafe-pickle"])
        assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("dalle.*"))
