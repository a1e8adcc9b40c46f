#!/usr/bin/env bash
# The environment of the make commands: cmake/setup.sh GROUP...
#
# Installs the named [dependency-groups] of pyproject.toml into .venv, and what no wheel carries (compiler, headers,
# GoogleTest, Google Benchmark, OpenCL and Vulkan on the CPU, QEMU) by apt-get where that works without a password. Where something stays missing it says in one
# line what. Does nothing for a group that is in place, until pyproject.toml changes. PYTHON names another interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
groups=("$@")
python=${PYTHON:-python3}
venv=.venv

say() { echo "setup: $*" >&2; }
fail() { say "$*"; exit 1; }
wanted() { [[ " ${groups[*]} " == *" $1 "* ]]; }
compiles() { echo "#include <$2>" | "$1" -E -x "$3" - >/dev/null 2>&1; }

# ---- Wheels: is there anything to do? ----------------------------------------------------------------------------------

pins=$(cksum <pyproject.toml)
installed() { [[ -x $venv/bin/python && $(cat "$venv/.installed-$1" 2>/dev/null) == "$pins" ]]; }
todo=()
for group in "${groups[@]}"; do installed "$group" || todo+=("$group"); done
"$venv/bin/python" -c '' 2>/dev/null || todo=("${groups[@]}")  # no environment, or of an interpreter that is gone
((${#todo[@]})) || exit 0

# ---- What no wheel carries ---------------------------------------------------------------------------------------------

wheels_for="Python 3.11, 3.12 or 3.13 is missing, which Halide has wheels for"
command -v "$python" >/dev/null || fail "$wheels_for: no '$python' (PYTHON=... names another)"
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' ||
    fail "$wheels_for: '$python' is $("$python" -V 2>&1) (PYTHON=... names another)"
cc=${CC:-cc} cxx=${CXX:-c++}
python_header=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include") + "/Python.h")')

missing() { # lines "package: what it is for", of what is not there
    "$python" -c 'import ensurepip, venv' 2>/dev/null || echo "python3-venv: Python's module venv"
    [[ -e $python_header ]] || echo "python3-dev: $python_header"
    compiles "$cc" stdio.h c && compiles "$cxx" vector c++ || echo "g++: a C and C++17 compiler"
}
missing_for_tests() { # CMake fetches the libraries where the system has none, and leaves the test of holdfast.pc out
    wanted test || return 0
    compiles "$cxx" gtest/gtest.h c++ || echo "libgtest-dev: GoogleTest"
    compiles "$cxx" benchmark/benchmark.h c++ || echo "libbenchmark-dev: Google Benchmark"
    command -v pkg-config >/dev/null || echo "pkg-config: what holdfast.pc is for"
    [[ $(uname) == Linux ]] || return 0
    [[ $(uname -m) != x86_64 ]] || command -v qemu-x86_64 qemu-x86_64-static >/dev/null ||
        echo "qemu-user: processors without AVX-512, and without AVX2"
    has_library libOpenCL.so.1 || echo "ocl-icd-libopencl1: OpenCL"
    compgen -G "/etc/OpenCL/vendors/*.icd" >/dev/null || echo "pocl-opencl-icd: an OpenCL device, the CPU"
    has_library libvulkan.so.1 || echo "libvulkan1: Vulkan"
    compgen -G "/usr/share/vulkan/icd.d/*.json" >/dev/null || echo "mesa-vulkan-drivers: a Vulkan device, the CPU"
}
has_library() { [[ $(PATH=$PATH:/sbin:/usr/sbin ldconfig -p) == *"$1"* ]]; }

packages=$( (missing && missing_for_tests) | cut -d: -f1 | xargs)
if [[ -n $packages ]] && command -v apt-get >/dev/null; then
    as_root=()
    ((EUID == 0)) || as_root=(sudo -n)
    if "${as_root[@]}" true 2>/dev/null; then
        say "installing $packages (apt-get)"
        apt_get() { "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0 "$@" </dev/null >/dev/null; }
        # shellcheck disable=SC2086
        { apt_get update && apt_get install -y --no-install-recommends $packages; } || say "apt-get did not install $packages"
    fi
fi
still_missing=$(missing)
[[ -z $still_missing ]] ||
    fail "missing: ${still_missing//$'\n'/; } (Debian, Ubuntu: sudo apt-get install $(cut -d: -f1 <<<"$still_missing" | xargs))"
still_missing=$(missing_for_tests)
[[ -z $still_missing ]] || say "not there, so that its tests are skipped or it is fetched: ${still_missing//$'\n'/; }"

# ---- Wheels ------------------------------------------------------------------------------------------------------------

pip_install() { # pip warns about each local index that lacks a package
    "$venv/bin/python" -m pip install --disable-pip-version-check --no-input "$@" \
        2> >(grep -v "^WARNING: Location '.*' is ignored" >&2) | { grep --line-buffered -v '^Requirement already satisfied' || true; }
}
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    say "making $venv with $("$python" -V)"
    rm -rf "$venv"
    "$python" -m venv "$venv"
fi
group_pins() { "$venv/bin/python" -c 'import sys, tomllib
print(*tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"][sys.argv[1]])' "$1"; }
pip_install --quiet "$(group_pins pip)"
for group in "${todo[@]}"; do
    say "installing the wheels of group '$group' (pyproject.toml)"
    pip_install --group "$group" || fail "pip could not install group '$group': see its last lines above"
    echo "$pins" >"$venv/.installed-$group"
done
