"""Runs a script with completions that never stop: each has --max-new-tokens tokens, so that steps can be compared.

    python benchmarks/forced_length.py onpolicy_distill --num-steps 2 --max-new-tokens 128

The first argument is the script; the rest are its flags. Read `perf/peak_memory_gb` and `time/*` of the second step:
the optimizer's moments exist from the end of the first one on. Environment variables, which bench.py sets:

    BENCH_ROOT=FOLDER     the scripts of another checkout, such as an older revision
    BENCH_NATURAL=1       completions end where the model ends them
    BENCH_OWN_PRODUCTS=1  revisions that let oneDNN compute the products on some CPUs leave them to PyTorch
"""

import importlib
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, os.environ.get("BENCH_ROOT") or str(Path(__file__).resolve().parent.parent))

import tyro

import common

if __name__ == "__main__":
    script = importlib.import_module(sys.argv.pop(1))
    if os.environ.get("BENCH_OWN_PRODUCTS") and hasattr(common, "onednn_is_faster"):
        common.onednn_is_faster = lambda: False
    for engine_class in () if os.environ.get("BENCH_NATURAL") else (common.HFEngine, common.VLLMEngine):

        def endless(engine: Any, *args: Any, generate: Any = engine_class.generate, **options: Any) -> Any:
            engine.stop_ids = []
            return generate(engine, *args, **options)

        engine_class.generate = endless
    common.run(script.main, tyro.cli(script.Args))
