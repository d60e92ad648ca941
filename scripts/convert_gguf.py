"""Convert a GGUF file to a safetensors checkpoint: dequantized weights, tokenizer, generation config and model card.

python scripts/convert_gguf.py FOLDER FILE.gguf models/base/NAME
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # imports start at the repository's root, not in this folder

    import common.interrupts  # noqa: F401

import argparse
import shutil

from gguf import GGUFReader
from huggingface_hub import ModelCard, ModelCardData

from common.cli import launch
from common.config import ModelConfig, PromptConfig
from common.files import resolve_path, write_text
from common.model import load_model, load_tokenizer
from common.results import CARD
from evaluation.tables import as_text


def convert(folder: str, gguf_file: str, target: Path) -> None:
    """Write the checkpoint to a temporary folder and rename that to `target`, so that `target` is never incomplete."""
    config = ModelConfig(path=folder, gguf_file=gguf_file, prompt=PromptConfig(style="plain"))
    tokenizer = load_tokenizer(config)
    model = load_model(config, tokenizer, trainable=False)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    write_text(partial / CARD, str(model_card(Path(resolve_path(folder)) / gguf_file)))
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    print(f"{target}: {model.num_parameters() / 1e6:.0f} M parameters")


def model_card(gguf_file: Path) -> ModelCard:
    """The card of the converted model, with the license that the GGUF file names, if it does."""
    fields = GGUFReader(gguf_file).fields
    named = {key: fields.get(f"general.{key.replace('_', '.')}") for key in ("license", "license_name", "license_link")}
    head = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        **{key: str(found.contents()) for key, found in named.items() if found},
    )
    text = (
        f"# {as_text(gguf_file.name)}, dequantized\n\nThe weights are those of the GGUF file, as float32 safetensors. "
        "Quantization lost precision that this does not bring back.\n\n    from transformers import AutoModelForCausalLM\n\n"
        '    model = AutoModelForCausalLM.from_pretrained(".")  # this folder\n'
    )
    return ModelCard(f"---\n{head.to_yaml()}\n---\n\n{text}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="folder with the GGUF file")
    parser.add_argument("gguf_file", help="name of the GGUF file")
    parser.add_argument("target", type=Path, help="folder to write")
    arguments = parser.parse_args()
    convert(arguments.folder, arguments.gguf_file, arguments.target)


if __name__ == "__main__":
    launch(main, one_process=True)
