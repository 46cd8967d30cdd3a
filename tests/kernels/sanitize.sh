#!/bin/sh
# Run the CPU kernels' tests with the address and undefined-behaviour sanitizers (GCC, Linux).
# Usage: tests/kernels/sanitize.sh [python]
set -eu
cd "$(dirname "$0")/../.."
python=${1:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
g++ -std=c++17 -O1 -g -fPIC -shared -fvisibility=hidden -Wno-psabi \
    -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer \
    src/wina/kernels/cpu/*.cpp -o "$folder/libwina_cpu.so"
# torch and Python leak on purpose and throw before the sanitizer's runtime is asked.
WINA_CPU_LIBRARY=$folder/libwina_cpu.so \
LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)" \
PYTHONPATH=src ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0 UBSAN_OPTIONS=print_stacktrace=1 \
    "$python" -m pytest -q -s -p no:cacheprovider tests/kernels --ignore-glob='*cuda*' -k "not compiled_in_one_graph and not when_compiled"
echo "sanitizers: clean"
