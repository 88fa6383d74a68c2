#!/usr/bin/env bash
# llama.cpp's own server for benchmarks/serve_traces.py: from the source that the peers' llama-cpp-python was built from,
# upon that package's own libraries (AMX off: snello/measure/peers/environments.py), so that both measure one engine.
# It lands in $SNELLO_PEERS (else ~/.cache/snello/peers), in llama-server/llama-server; JOBS compilers run at once.
set -euo pipefail
list="$(dirname "$0")/../snello/measure/peers/requirements/llamacpp.txt"
version="$(sed -n 's/^llama-cpp-python==//p' "$list")"
peers="${SNELLO_PEERS:-$HOME/.cache/snello/peers}"
home="$peers/llama-server"
[[ -x $home/llama-server && $(cat "$home/made-from.txt") == "$version" ]] && exit
libraries=("$peers"/llamacpp/lib/python3*/site-packages/llama_cpp/lib)
[[ -e ${libraries[0]}/libllama.so ]] || {
    echo "no peer is installed there: snello bench --shape tinyllama-1.1b --install-peers llama.cpp" >&2
    exit 1
}
mkdir -p "$home" && cd "$home"
if [[ ! -d source ]]; then
    "${PYTHON:-python3}" -m pip download --quiet --disable-pip-version-check --no-deps --no-build-isolation \
        --no-binary :all: "llama-cpp-python==$version"
    mkdir source.new && tar xzf "llama_cpp_python-$version.tar.gz" -C source.new --strip-components 1
    mv source.new source
fi
cmake -S source/vendor/llama.cpp -B build -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=OFF -DLLAMA_OPENSSL=OFF \
    -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_HTML=OFF -DLLAMA_BUILD_TESTS=OFF \
    -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF
objects="$(ninja -C build -t targets all | sed -n 's/\.o: .*/.o/p' |
    grep -E '^(common|vendor|tools/(server|ui|mtmd))/' | grep -vE 'mtmd-cli|mtmd-debug|deprecation-warning')"
# shellcheck disable=SC2086 # names without spaces
ninja -C build -j "${JOBS:-1}" $objects
# shellcheck disable=SC2086
(cd build && g++ -o llama-server $objects -L"${libraries[0]}" -Wl,-rpath,"${libraries[0]}" \
    -lllama -lggml -lggml-cpu -lggml-base -lpthread -ldl)
mv build/llama-server llama-server
echo "$version" > made-from.txt
