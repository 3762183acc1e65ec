#!/usr/bin/env bash
# Everything that a machine with a GPU is asked, in order of worth: bench/on_gpu.sh [FOLDER] [SECONDS]
# Results come into FOLDER (default gpu-results) one by one, so that a run cut short loses only its last case; nothing new
# is started after SECONDS (default 1500). Needs the project installed with its test extra and CuPy; no network.
# REHEARSE=1 bench/on_gpu.sh: the same steps on the CPU with small sizes, to see that the script is whole.
set -uo pipefail
cd "$(dirname "$0")/.."

out=${1:-gpu-results}
limit=${2:-1500}
python=${PYTHON:-python3}
mkdir -p "$out"
: >"$out/steps.log"

step() { # name, command...
    local name=$1 status
    shift
    if ((SECONDS >= limit)); then
        echo "left out, no time: $name" | tee -a "$out/steps.log"
        return
    fi
    echo "== $name ($SECONDS s)" | tee -a "$out/steps.log"
    timeout "$((limit - SECONDS + 60))" "$@" >"$out/$name.log" 2>&1
    status=$?
    echo "   exit $status ($SECONDS s)" | tee -a "$out/steps.log"
    tail -n 3 "$out/$name.log"
}
bench() { # name, arguments of bench run; the array axes on top
    local name=$1
    shift
    [[ ${REHEARSE:-} ]] && axes=("${small[@]}")
    step "$name" "$python" -m bench run --out "$out/$name.json" --rounds 5 "$@" "${axes[@]}"
    axes=()
}

if [[ ${REHEARSE:-} ]]; then
    check=(--backend numpy)
    ours=(--rival gpurnn-numpy) step=(--rival products) generic=(--rival gpurnn-numpy) cudnn=(--rival torch-cpu)
    more=(--rival torch-cpu-compile) flash=(--rival products) wave=(--rival products)
    small=(-T 3 -B 2 -H 8 --dtype float32 --precision float32 --seconds 0.001)
    crossing=(--fast torch-cpu -H 8 -B 1 -B 2)
else
    check=(--backend cuda --backend cupy)
    ours=(--rival gpurnn-cuda) step=(--rival gpurnn-cuda-step) generic=(--rival gpurnn-cupy) cudnn=(--rival torch-cuda)
    more=(--rival torch-cuda-graph --rival torch-cuda-compile) flash=(--rival flashrnn-fused --rival flashrnn)
    wave=(--rival gpurnn-cuda-wavefront)
    crossing=()
fi
both=("${ours[@]}" "${cudnn[@]}")
axes=()

nvidia-smi -q >"$out/nvidia-smi.log" 2>&1
"$python" -m pip freeze >"$out/packages.log" 2>&1
step info "$python" -m gpurnn info --json
step check_quick "$python" -m gpurnn check --quick "${check[@]}"
step tests_gpu "$python" -m pytest -m gpu -q
step probe "$python" -m bench probe --out "$out/probe.json"
axes=(-H 256 -H 1024 -B 16 -B 64 --dtype float32 --precision float32)
bench first "${both[@]}" --suite house --cell lstm --cell gru
axes=(-H 128 -H 129 -H 192 -B 16 -B 64 --dtype float32 --dtype bfloat16 --precision float32)
bench block "${both[@]}" "${step[@]}" --suite house
axes=(-B 16 -T 1024)
bench flashrnn "${both[@]}" "${flash[@]}" --suite flashrnn
bench kernelbench "${both[@]}" "${more[@]}" --suite kernelbench
axes=(-H 128 -H 1024 -B 16 --dtype bfloat16)
bench stacks "${both[@]}" "${wave[@]}" --suite stacks
bench applications "${both[@]}" "${more[@]}" --suite applications
bench fusion "${ours[@]}" "${generic[@]}" --suite quick
axes=(-H 128 -H 129 -H 512 -H 1024 -B 7 -B 16 -B 128 --dtype bfloat16 --precision float32)
bench house16 "${both[@]}" --suite house
axes=(-B 16 -B 64 --dtype float32 --precision float32 --precision tf32)
bench house32 "${both[@]}" --suite house
step check "$python" -m gpurnn check --json "${check[@]}"
bench deepbench "${both[@]}" --suite deepbench
step crossover "$python" -m bench crossover "${crossing[@]}" --out "$out/crossover.json"
axes=(--dtype float16 --precision float32)
bench cudnn_map "${cudnn[@]}" --suite house --pass inference --pass train

for file in "$out"/*.json; do
    for kind in size roofline; do
        "$python" -m bench plot "$file" --kind "$kind" >/dev/null 2>&1
    done
done
runs=()
for file in "$out"/*.json; do
    grep -q '"cases"' "$file" && runs+=("$file")
done
((${#runs[@]})) && "$python" -m bench report "${runs[@]}" --html "$out/report.html"
cat "$out/steps.log"
