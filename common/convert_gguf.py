"""Turn a GGUF file into an ordinary safetensors checkpoint: dequantised weights, tokenizer and generation config.

python -m common.convert_gguf FOLDER FILE.gguf models/base/NAME
"""

import argparse
import shutil
from pathlib import Path

from common.config import ModelConfig, PromptConfig
from common.model import load_model, load_tokenizer
from common.runtime import launch


def convert(folder: str, gguf_file: str, target: Path) -> None:
    """Write the checkpoint; the target appears whole or not at all."""
    config = ModelConfig(path=folder, gguf_file=gguf_file, prompt=PromptConfig(style="plain"))
    tokenizer = load_tokenizer(config)
    model = load_model(config, tokenizer, trainable=False)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    print(f"{target}: {model.num_parameters() / 1e6:.0f} M parameters")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="folder of the GGUF file")
    parser.add_argument("gguf_file", help="its name")
    parser.add_argument("target", type=Path, help="folder to write")
    arguments = parser.parse_args()
    convert(arguments.folder, arguments.gguf_file, arguments.target)


if __name__ == "__main__":
    launch(main)
