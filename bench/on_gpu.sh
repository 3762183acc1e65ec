#!/usr/bin/env bash
# Everything that a machine with a GPU is asked, in order of worth: bench/on_gpu.sh [FOLDER] [SECONDS]
# Results come into FOLDER (default gpu-results) one by one, so that a run cut short loses only its last piece; nothing new
# is started after SECONDS (default 1500). Needs the project installed with its test extra and CuPy; no network.
set -uo pipefail
cd "$(dirname "$0")/.."

out=${1:-gpu-results}
limit=${2:-1500}
python=${PYTHON:-python3}
mkdir -p "$out"

step() { # name, command...
    local name=$1
    shift
    if ((SECONDS >= limit)); then
        echo "left out, no time: $name" | tee -a "$out/steps.log"
        return
    fi
    echo "== $name ($SECONDS s)" | tee -a "$out/steps.log"
    timeout "$((limit - SECONDS + 60))" "$@" >"$out/$name.log" 2>&1
    echo "   exit $? ($SECONDS s)" | tee -a "$out/steps.log"
    tail -n 3 "$out/$name.log"
}
bench() { # name, arguments of bench run...
    local name=$1
    shift
    step "$name" "$python" -m bench run --out "$out/$name.json" "$@"
}

nvidia-smi >"$out/nvidia-smi.log" 2>&1
"$python" -m pip freeze >"$out/packages.log" 2>&1
step info "$python" -m gpurnn info --json
step check_quick "$python" -m gpurnn check --quick --backend cuda
step tests_gpu "$python" -m pytest -m gpu -q
step check "$python" -m gpurnn check --json --backend cuda --backend cupy

gpu=(--rival gpurnn-cuda --rival torch-cuda --rounds 5)
bench first "${gpu[@]}" --suite house --cell lstm --cell gru -H 256 -H 1024 -B 16 -B 64 --dtype float32 --precision float32
bench flashrnn "${gpu[@]}" --suite flashrnn -B 16 -T 1024
bench kernelbench "${gpu[@]}" --suite kernelbench
bench fusion --rival gpurnn-cuda --rival gpurnn-cupy --suite quick --rounds 5
bench house16 "${gpu[@]}" --suite house --dtype bfloat16 -H 128 -H 129 -H 512 -H 1024 -B 7 -B 16 -B 128 --precision float32
bench house32 "${gpu[@]}" --suite house --dtype float32 -B 16 -B 64 --precision float32 --precision tf32
bench deepbench "${gpu[@]}" --suite deepbench
step crossover "$python" -m bench crossover --out "$out/crossover.json"
for file in "$out"/*.json; do
    "$python" -m bench plot "$file" >/dev/null 2>&1
done
cat "$out/steps.log"
