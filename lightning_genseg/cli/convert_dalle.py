"""`genseg convert-dalle`: OpenAI's pickles of the DALL-E dVAE become a file of plain tensors."""

from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors.torch import save
from torch import Tensor, nn

from lightning_genseg.cli.messages import say
from lightning_genseg.cli.parser import Parser
from lightning_genseg.errors import GenSegError, MissingFileError
from lightning_genseg.files import replace_file
from lightning_genseg.methods.gss.tokenizers.load import make_tokenizer

_WARNING = """\
{encoder} and {decoder} are pickled Python objects, not tensors:
loading them EXECUTES whatever code they contain. Do it with files from cdn.openai.com/dall-e only,
in an environment that holds nothing of value, with the packages DALL-E and attrs installed.
The file that is written holds plain tensors; the rest of this package never unpickles."""


def convert(encoder: Path, decoder: Path, output: Path) -> str:
    """Write encoder and decoder to one file that `make_tokenizer` takes; return its fingerprint.

    Executes the code in the pickles.

    Args:
        encoder: `encoder.pkl`.
        decoder: `decoder.pkl`.
        output: file to write, .safetensors.

    Raises:
        GenSegError: a pickle is missing or no module of the dVAE, or `output` has another suffix
            or exists.
    """
    if output.suffix != ".safetensors":
        raise GenSegError(f"output '{output}' must end in .safetensors.")
    if output.exists():
        raise GenSegError(f"output '{output}' exists: give the path of a new file.")
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
        except (UnpicklingError, RuntimeError, EOFError) as error:
            raise GenSegError(f"{name} '{path}' cannot be read: download it again.") from error
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
    except GenSegError:
        output.unlink()
        raise


class _Command:
    """`genseg convert-dalle`."""

    help = "Turn OpenAI's pickles of the DALL-E dVAE into tensors, the paper's tokenizer of GSS."

    def make_parser(self) -> Parser:
        parser = Parser(prog="genseg convert-dalle", description=self.help, epilog=None)
        parser.add_argument("encoder", type=Path, help="encoder.pkl")
        parser.add_argument("decoder", type=Path, help="decoder.pkl")
        parser.add_argument("output", type=Path, help="file to write, .safetensors")
        parser.add_argument(
            "--allow-unsafe-pickle", action="store_true", help="execute the code in the pickles"
        )
        return parser

    def run(self, words: list[str]) -> None:
        """Say what a conversion does, and do it only where that is allowed."""
        options = self.make_parser().parse_args(words)
        say(_WARNING.format(encoder=options.encoder, decoder=options.decoder))
        if not options.allow_unsafe_pickle:
            raise GenSegError(
                "nothing was loaded: give --allow-unsafe-pickle if that is what you want."
            )
        fingerprint = convert(options.encoder, options.decoder, options.output)
        print(
            f"{options.output} is written (fingerprint {fingerprint}): --model.tokenizer "
            f"{options.output}"
        )


COMMAND = _Command()
