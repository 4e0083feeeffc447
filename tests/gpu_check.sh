#!/usr/bin/env bash
# What there is to see on a GPU, for `make gpu-check`: tests, a quick benchmark, compute-sanitizer.
#
#     tests/gpu_check.sh PYTHON FOLDER DEADLINE
#
# Time on a GPU is scarce: all steps run, whatever the first ones find; each has a limit in seconds,
# and the last ones end some seconds after DEADLINE (since 1970). All that is to be kept lies in FOLDER.
# Variables: PYTEST_ARGS, CUDA_HOME.
set -uo pipefail
python=$1 folder=$2 deadline=$3
cd "$(dirname "$0")"
failed=()
eval "pytest_args=(${PYTEST_ARGS:-})"  # with the quotes in it

# Interrupted rather than killed, pytest still says what it has found.
limited() {
  local limit=$1 left=$((deadline - $(date +%s)))
  shift
  if [ "$left" -lt "$limit" ]; then limit=$((left > 1 ? left : 1)); fi
  timeout -s INT -k 10 "$limit" "$@"
  local status=$?
  [ "$status" = 5 ] && [ -n "${PYTEST_ARGS:-}" ] && return  # pytest: no such test, as was asked
  return "$status"
}

step() {
  echo
  echo "== ${*:2} (at most $1 s)"
  limited "$@" && return
  failed+=("${*:2}")
  return 1
}

gpu_tests() {
  step "$1" "$python" -m pytest --backend cuda "${pytest_args[@]}" "${@:2}"
}

sanitizer=${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer
[ -x "$sanitizer" ] || sanitizer=compute-sanitizer
# Of our kernels alone, which is faster, and without what libraries ask the driver to see whether it
# can. Not so initcheck: it must see cuBLAS write what our kernels read, and what it says of cuBLAS
# itself does not count.
sanitize() {
  local tool=$1 selected=$2 log=$3
  local options=(--target-processes application-only)
  case $tool in
    initcheck) options+=(--print-limit 100000) ;;
    memcheck) options+=(--report-api-errors no) ;&
    *) options+=(--kernel-name kernel_substring=lsoftmax --error-exitcode 1) ;;
  esac
  # Without torch's caching of memory, memcheck sees where each tensor ends.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited 120 "$sanitizer" --tool "$tool" "${options[@]}" \
    "$python" -m pytest --backend cuda -k "$selected" >"$log" 2>&1 || return
  # Not -q, which stops reading: the first grep would fail for it.
  if [ "$tool" = initcheck ]; then
    # By name, or where code was inlined by file.
    ! grep -E '^=+ +(at|Device Frame:).*(lsoftmax|/csrc/)' "$log" >/dev/null
  fi
}

# The tools side by side: each keeps a core busy rather than the GPU.
sanitizers() {
  local name=$1 selected=$2 tools=(memcheck racecheck synccheck initcheck) jobs=() i log
  echo
  echo "== compute-sanitizer, tests of '$selected' (at most 120 s)"
  for i in "${!tools[@]}"; do
    sanitize "${tools[i]}" "$selected" "$folder/$name-${tools[i]}.txt" &
    jobs[i]=$!
  done
  for i in "${!tools[@]}"; do
    log=$folder/$name-${tools[i]}.txt
    wait "${jobs[i]}" || failed+=("compute-sanitizer, see $log")
    echo "${tools[i]}: $(tail -n 1 "$log")"
  done
}

step 20 nvidia-smi
step 60 "$python" -m lsoftmax
# Hand-written assembly that hangs must not cost the other tests their time.
gpu_tests 240 --ignore=test_fused_forward.py
gpu_tests 60 test_fused_forward.py || export LSOFTMAX_FUSED_FORWARD=0  # nor the benchmarks
step 150 env -C .. "$python" -m benchmarks --quick --output "$folder/benchmark.json"
sanitizers sanitized "sanitizer_smoke and not hopper"
sanitizers sanitized-hopper "sanitizer_smoke and hopper"
echo
if [ ${#failed[@]} -gt 0 ]; then
  printf 'FAILED:\n'
  printf '  %s\n' "${failed[@]}"
  exit 1
fi
echo "All passed."
