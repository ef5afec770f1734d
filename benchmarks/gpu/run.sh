#!/usr/bin/env bash
# All checks and figures of a GPU in nine minutes at most; README.md in this folder says what the lines mean.
#   bash benchmarks/gpu/run.sh OUT
# WHEELS=FOLDER: first installs the wheels in it, without a network. DRY=1: a dry run on the CPU.
# PYTHON: the interpreter, python3 by default.
set -u
mkdir -p "${1:?where the logs go}" && out=$(cd "$1" && pwd) || exit 2
wheels=${WHEELS:+$(cd "$WHEELS" && pwd)}
cd "$(dirname "$0")/../.." || exit 2
python=${PYTHON:-python3} runs=$(mktemp -d) dry=${DRY:-}
trap 'rm -rf "$runs"' EXIT
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
[ -n "$dry" ] && export CUDA_VISIBLE_DEVICES=""
if [ -n "$wheels" ]; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$runs/site" "$wheels"/*.whl || exit 2
    export PYTHONPATH="$runs/site${PYTHONPATH:+:$PYTHONPATH}"
fi
command -v nvidia-smi > /dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader

verdict() { # what, exit code, wanted code: one line, and a failure is remembered
    if [ "$2" -eq "$3" ]; then echo "PASS $1: exit code $2"; return; fi
    echo "FAIL $1: exit code $2 (wanted $3)" | tee -a "$runs/failed"
}

part() { # seconds, name of the log, script and its arguments
    local seconds=$1 log="$out/$2.log"; shift 2
    timeout "$seconds" "$python" "$@" > "$log" 2>&1
    local code=$?
    grep -E "PASS|FAIL|info|^\[|left out|Error|TFLOP|^correct:|^figures:" "$log"
    verdict "$(basename "$1") of $seconds s at most" "$code" 0
}

script() { # name, script and its flags
    local name=$1; shift
    timeout 70 "$python" "$@" --output-dir "$runs/$name" > "$runs/$name.log" 2>&1
    verdict "$1 ($name)" $? 0
}

resumed() { # a run that goes on from its middle against one that was never broken
    script sft sft.py "${short[@]}" --num-steps 6
    cp -r "$runs/sft" "$runs/sft-resumed" && rm -rf "$runs/sft-resumed/step_6" "$runs/sft-resumed/final"
    timeout 40 "$python" sft.py "${short[@]}" --num-steps 6 --resume --output-dir "$runs/sft-resumed" \
        > "$runs/sft-resumed.log" 2>&1
    verdict "sft.py --resume" $? 0
    local same="differs"
    cmp -s "$runs"/sft{,-resumed}/step_6/model.safetensors && same="bit for bit"
    echo "info resume: $same"
}

terminated() { # SIGTERM after the first step: a checkpoint, and 128 + 15
    "$python" grpo.py "${short[@]}" --num-steps 100000 --max-new-tokens 32 --output-dir "$runs/term" \
        > "$runs/term.log" 2>&1 &
    local pid=$! second
    for second in $(seq 70); do [ -s "$runs/term/metrics.jsonl" ] && break; sleep 1; done
    kill -TERM "$pid"
    (sleep 30; kill -KILL "$pid") 2> /dev/null & local watch=$!
    wait "$pid"
    verdict "grpo.py after SIGTERM, in its second $second" $? 143
    kill "$watch" 2> /dev/null
    [ -n "$(ls -d "$runs"/term/step_* 2> /dev/null)" ]
    verdict "its checkpoint" $? 0
}

part 120 correct benchmarks/gpu/correct.py "$out"

# The five commands side by side (in a dry run one after the other)
short=(--eval-steps 0 --saving-steps 3 --batch-size 8)
rollouts=("${short[@]}" --num-steps 4 --max-new-tokens 32)
resumed & [ -n "$dry" ] && wait
script grpo grpo.py "${rollouts[@]}" --kl-penalty 0.01 & [ -n "$dry" ] && wait
script grpo-fp32 grpo.py "${rollouts[@]}" --dtype fp32 & [ -n "$dry" ] && wait
script distill onpolicy_distill.py "${rollouts[@]}" & [ -n "$dry" ] && wait
script evaluate evaluate.py --num-samples 128 --max-new-tokens 32 & [ -n "$dry" ] && wait
terminated &
wait
tail -n 15 "$runs"/*.log > "$out/scripts.log"

part 185 figures-0.5B benchmarks/gpu/figures.py 0.5B 165 "$out"
part 105 figures-1.5B benchmarks/gpu/figures.py 1.5B 85 "$out"
if [ -e "$runs/failed" ]; then echo "$(wc -l < "$runs/failed") failed"; exit 1; fi
echo "nothing failed, in $SECONDS seconds"
