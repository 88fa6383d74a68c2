#!/usr/bin/env bash
# The core on ARM, wherever a Debian of x86-64 runs: cross-compiled, and run with the tests of tests/native by Debian's own
# Python for arm64 under QEMU's user emulation; then a model's answers are compared bit by bit with this machine's.
# Needs g++-aarch64-linux-gnu and qemu-user-static. Everything else comes into build/arm; SNELLO_ARM_CPU names one of
# QEMU's processors, as cortex-a76, which has SDOT and not SMMLA.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin="$PWD/.venv/bin" arm="$PWD/build/arm" jobs="${JOBS:-2}"
root="$arm/root" site="$arm/site" tree="$arm/tree" native="$arm/native"

for tool in aarch64-linux-gnu-g++ qemu-aarch64-static apt-get dpkg-deb; do
    command -v "$tool" > /dev/null && continue
    echo "make test-arm: no $tool here; apt-get install g++-aarch64-linux-gnu qemu-user-static" >&2
    exit 1
done

# Debian's Python for arm64, unpacked only: an apt with lists of its own, so that the system's stays as it is.
packages=(libc6 libstdc++6 libgcc-s1 zlib1g libexpat1 libffi8 libbz2-1.0 liblzma5 libcrypt1 libssl3 libsqlite3-0 libuuid1
    libpython3.11-minimal libpython3.11-stdlib python3.11-minimal)
if [[ ! -e $root/installed ]]; then
    echo "fetching Python for arm64" >&2
    rm -rf "$root" "$arm/apt"
    mkdir -p "$root" "$arm/apt/lists/partial" "$arm/apt/archives/partial" "$arm/apt/debs"
    apt=(apt-get -qq -o "Dir::State=$arm/apt" -o "Dir::State::status=/dev/null" -o "Dir::Cache=$arm/apt"
        -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Sandbox::User=)
    "${apt[@]}" update
    (cd "$arm/apt/debs" && "${apt[@]}" download "${packages[@]}")
    for package in "$arm"/apt/debs/*.deb; do dpkg-deb -x "$package" "$root"; done
    mv "$root/usr/bin/python3.11" "$root/usr/bin/python3.11.arm64"
    touch "$root/installed"
fi
# Python starts itself again for tests in other processes, so its name must be something that this machine can run.
python="$root/usr/bin/python3.11"
cat > "$python" << END
#!/bin/sh
PYTHONPATH="$tree:$site" PYTHONDONTWRITEBYTECODE=1 PATH="$arm/bin:\$PATH" SNELLO_CACHE="$arm/cache" \\
  exec qemu-aarch64-static -L "$root" -cpu "\${SNELLO_ARM_CPU:-max}" -0 "$python" "$python.arm64" "\$@"
END
chmod +x "$python"
mkdir -p "$arm/bin"
ln -sf "$(command -v aarch64-linux-gnu-objdump)" "$arm/bin/objdump"

wanted="$(grep -E '^(Jinja2|MarkupSafe|huggingface_hub|numpy|pytest|pytest-xdist|tokenizers)==' requirements/lock.txt)"
if [[ ! -e $site/installed || $(< "$site/installed") != "$wanted" ]]; then
    echo "fetching packages for arm64" >&2
    rm -rf "$site"
    # shellcheck disable=SC2086
    "$bin/python" -m pip install --quiet --disable-pip-version-check --target "$site" --python-version 3.11 \
        --only-binary=:all: --platform manylinux_2_28_aarch64 --platform manylinux2014_aarch64 $wanted
    echo "$wanted" > "$site/installed"
fi

echo "compiling the core for arm64" >&2
"$bin/cmake" -S . -B "$native" -G Ninja -DCMAKE_MAKE_PROGRAM="$bin/ninja" -DCMAKE_SYSTEM_NAME=Linux \
    -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_CXX_FLAGS=-Werror \
    --log-level=WARNING > /dev/null
"$bin/cmake" --build "$native" --parallel "$jobs" -- --quiet
rm -rf "$tree"
mkdir -p "$tree"
tar -c --exclude='*.so' --exclude=__pycache__ snello tests scripts/fingerprint.py pyproject.toml | tar -x -C "$tree"
cp "$native/libsnello.so" "$tree/snello/native/"

# Emulation knows no limits of memory, and its speed says nothing; what tests compile would be this machine's.
(cd "$tree" && "$python" -m pytest -q -p no:cacheprovider -n "$jobs" -m 'slow or not slow' tests/native \
    --deselect tests/native/test_memory.py::test_no_exception_crosses_the_boundary \
    --deselect tests/native/test_pool.py::test_probes_measure_something \
    --deselect tests/native/test_pool.py::test_every_item_is_done_once_and_nobody_races \
    --ignore tests/native/test_children.py)

echo "comparing answers with this machine's" >&2
models=(demo)
for weights in int3 int4 int8; do
    [[ -e $arm/$weights/model.safetensors ]] || "$bin/snello" apply quantize demo --weights "$weights" --cache int8 \
        -o "$arm/$weights" --overwrite --quiet > /dev/null
    models+=("$arm/$weights")
done
"$bin/python" scripts/fingerprint.py "${models[@]}" | tee "$arm/here.txt"
(cd "$tree" && "$python" scripts/fingerprint.py "${models[@]}") | tee "$arm/there.txt"
if [[ $(cut -d' ' -f1,2 "$arm/here.txt" | sort -u) != $(cut -d' ' -f1,2 "$arm/there.txt" | sort -u) ]]; then
    echo "ARM's answers differ from this machine's" >&2
    exit 1
fi
echo "the same bits on both machines" >&2
