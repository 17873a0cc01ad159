"""Turn OpenAI's pickles of the DALL-E dVAE into a file of plain tensors: `python -m lightning_genseg.convert_dalle`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from lightning_genseg.errors import GenSegError, MissingFileError
from lightning_genseg.files import replace_file
from lightning_genseg.methods.gss.tokenizers.load import make_tokenizer

_WARNING = """\
{encoder} and {decoder} are pickled Python objects, not tensors: loading them EXECUTES whatever code they contain. Do it
with files from cdn.openai.com/dall-e only, in an environment that holds nothing of value, with the packages DALL-E and
attrs installed. The file that is written holds plain tensors; the rest of this package never unpickles."""


def convert(encoder: Path, decoder: Path, output: Path) -> str:
    """Write encoder and decoder to one .safetensors file that `make_tokenizer` takes; its fingerprint is returned.

    Executes the code in the pickles.

    Args:
        encoder: `encoder.pkl`.
        decoder: `decoder.pkl`.
        output: file to write, .safetensors.

    Raises:
        FileNotFoundError: a pickle is missing.
        ValueError: `output` has another suffix, or a file is no pickled module of the dVAE.
    """
    if output.suffix != ".safetensors":
        raise GenSegError(f"output '{output}' must end in .safetensors.")
    state: dict[str, Tensor] = {}
    for name, path in (("encoder", encoder), ("decoder", decoder)):
        if not path.is_file():
            raise MissingFileError(
                f"{name} '{path}' does not exist: give the {name}.pkl of OpenAI."
            )
        try:
            module = torch.load(path, map_location="cpu", weights_only=False)
        except ModuleNotFoundError as error:
            raise GenSegError(
                f"{name} '{path}' needs the package {error.name}: install DALL-E and attrs."
            ) from error
        if not isinstance(module, nn.Module):
            raise GenSegError(
                f"{name} '{path}' is no pickled module: it may be plain tensors already, which "
                "need no conversion."
            )
        for key, tensor in module.state_dict().items():
            state[f"{name}.{key}"] = tensor.float().contiguous()
    replace_file(output, save(state))
    try:
        return make_tokenizer(output, torch.zeros(0, 3)).fingerprint()
    except ValueError:
        output.unlink()
        raise


def main(args: list[str] | None = None) -> None:
    """Say what a conversion does, and do it only where that is allowed."""
    parser = argparse.ArgumentParser(
        "python -m lightning_genseg.convert_dalle", description=__doc__
    )
    parser.add_argument("encoder", type=Path, help="encoder.pkl")
    parser.add_argument("decoder", type=Path, help="decoder.pkl")
    parser.add_argument("output", type=Path, help="file to write, .safetensors")
    parser.add_argument(
        "--allow-unsafe-pickle", action="store_true", help="execute the code in the pickles"
    )
    options = parser.parse_args(args)
    sys.stderr.write(_WARNING.format(encoder=options.encoder, decoder=options.decoder) + "\n")
    if not options.allow_unsafe_pickle:
        parser.exit(2, "Nothing was loaded: give --allow-unsafe-pickle if that is what you want.\n")
    try:
        fingerprint = convert(options.encoder, options.decoder, options.output)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(
        f"{options.output} is written (fingerprint {fingerprint}): --model.tokenizer "
        f"{options.output}"
    )


if __name__ == "__main__":
    main()
