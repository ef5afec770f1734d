"""Runs a script with completions that never stop: each has --max-new-tokens tokens, so that steps can be compared.

    python benchmarks/forced_length.py onpolicy_distill --num-steps 2 --max-new-tokens 128

The first argument is the script, grpo or onpolicy_distill; the rest are its flags. Read `perf/peak_memory_gb` and
`time/*` of the second step: the optimizer's moments exist from the end of the first one on.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro

import common

if __name__ == "__main__":
    script = importlib.import_module(sys.argv.pop(1))
    for engine_class in (common.HFEngine, common.VLLMEngine):

        def endless(engine: Any, *args: Any, generate: Any = engine_class.generate, **options: Any) -> Any:
            engine.stop_ids = []
            return generate(engine, *args, **options)

        engine_class.generate = endless
    common.run(script.main, tyro.cli(script.Args))
