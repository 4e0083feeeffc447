#!/usr/bin/env bash
# What there is to see on a GPU, for `make gpu-check`: tests, compute-sanitizer, a quick benchmark.
#
#     tests/gpu_check.sh PYTHON FOLDER DEADLINE
#
# Time on a GPU is scarce: everything runs, whatever the first parts find; each has a limit in
# seconds, and the last ends some seconds after DEADLINE (since 1970). All that is to be kept lies in
# FOLDER. Variables: PYTEST_ARGS, CUDA_HOME.
set -uo pipefail
python=$1 folder=$2 end=$3
cd "$(dirname "$0")"
failed=$folder/failed.txt
: >"$failed"
rm -f "$folder/benchmark.json"  # of the last time: no run writes over a result
eval "pytest_args=(${PYTEST_ARGS:-})"  # with the quotes in it
selection=()  # of them what says which tests, not how much pytest says
for argument in "${pytest_args[@]}"; do
  [[ $argument =~ ^(-[qv]+|--quiet|--verbose)$ ]] || selection+=("$argument")
done

# Interrupted rather than killed, pytest still says what it has found.
limited() {
  local limit=$1 left=$((deadline - $(date +%s)))
  shift
  if [ "$left" -lt "$limit" ]; then limit=$((left > 1 ? left : 1)); fi
  timeout -s INT -k 10 "$limit" "$@"
}

step() {
  echo
  echo "== ${*:2} (at most $1 s)"
  limited "$@" || echo "${*:2}" >>"$failed"
}

# Tests and tools run side by side: each keeps a core busy rather than the GPU. In processes of their
# own, what hangs, or has a fault after which the GPU answers no more, costs no other its time.
slots=$(nproc)
side() {
  local name=$1 log=$folder/$1.txt
  while [ "$(jobs -rp | wc -l)" -ge "$slots" ]; do wait -n; done
  {
    "${@:2}" >"$log" 2>&1 || echo "$name, see $log" >>"$failed"
    echo "$name: $(tail -n 1 "$log")"
  } &
}

gpu_tests() {
  limited 200 "$python" -m pytest --backend cuda "$@"
}

sanitizer=${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer
[ -x "$sanitizer" ] || sanitizer=compute-sanitizer
smoke=$(grep -l sanitizer_smoke test_*.py)
# Of our kernels alone, which is faster, and without what libraries ask the driver to see whether it
# can. Not so initcheck: it must see cuBLAS write what our kernels read, and what it says of cuBLAS
# itself does not count.
sanitize() {
  local tool=$1 selected=$2 options=(--target-processes application-only) report
  case $tool in
    initcheck) options+=(--print-limit 100000) ;;
    memcheck) options+=(--report-api-errors no) ;&
    *) options+=(--kernel-name kernel_substring=lsoftmax --error-exitcode 1) ;;
  esac
  report=$(mktemp)
  # Without torch's caching of memory, memcheck sees where each tensor ends.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited 200 "$sanitizer" --tool "$tool" "${options[@]}" \
    "$python" -m pytest --backend cuda $smoke -k "sanitizer_smoke and $selected" >"$report" 2>&1
  local status=$?
  head -c 1000000 "$report"  # initcheck can fill a disk
  tail -n 1 "$report"
  if [ "$tool" = initcheck ] && [ "$status" = 0 ]; then
    # By name, or where code was inlined by file.
    ! grep -qE '^=+ +(at|Device Frame:).*(lsoftmax|/csrc/)' "$report"
    status=$?
  fi
  rm "$report"
  return "$status"
}

deadline=$((end - 200))  # what the benchmark at the end has, which wants the machine to itself
step 20 nvidia-smi
step 60 "$python" -m lsoftmax
echo
for tool in memcheck racecheck synccheck initcheck; do
  side "$tool" sanitize "$tool" "not hopper"
done
# Of Hopper's forward pass, initcheck takes what cuBLAS writes, by the copy engine it seems, for
# unwritten, and racecheck ends in an internal error (both seen with CUDA 13.0).
for tool in memcheck synccheck; do
  side "$tool-hopper" sanitize "$tool" hopper
done
# Files with the most tests first.
files=$(gpu_tests "${selection[@]}" --collect-only -q | grep -o 'test_[a-z_]*\.py::' | uniq -c | sort -rn)
[ -n "$files" ] || echo "no tests" >>"$failed"
for file in $(cut -d: -f1 <<<"$files" | sed 's/.* //'); do
  side "${file%.py}" gpu_tests "${pytest_args[@]}" "$file"
done
wait
grep -q '^test_fused_forward,' "$failed" && export LSOFTMAX_FUSED_FORWARD=0  # nor the benchmarks
deadline=$end
step 200 env -C .. "$python" -m benchmarks --quick --seconds 2 --output "$folder/benchmark.json"
echo
if [ -s "$failed" ]; then
  echo "FAILED:"
  sed 's/^/  /' "$failed"
  exit 1
fi
echo "All passed."
