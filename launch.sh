#!/usr/bin/env bash
# The front door: `bash launch.sh <command> [flags passed on]`; `bash launch.sh help` lists the commands.
#
# It works from any folder: paths in flags, and the defaults runs/ and data/, are relative to where you
# stand. Every command first sets up what it needs in .venv beside this file; what it says about that goes
# to stderr. ZEROBERT_PYTHON=/path/to/python uses an environment that exists, and installs nothing.
set -euo pipefail

self=${BASH_SOURCE[0]}
while [ -L "$self" ]; do # called by a link from elsewhere
    target=$(readlink -- "$self")
    case $target in /*) self=$target ;; *) self=$(dirname -- "$self")/$target ;; esac
done
root=$(CDPATH='' cd -- "$(dirname -- "$self")" && pwd -P)
venv=$root/.venv
stamp=$venv/.zerobert-ready     # what a finished set-up was made from
marker=$venv/.zerobert-begun    # a set-up that did not finish: nothing in the folder can be trusted
log=$venv/setup.log

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 2; }

usage() {
    cat <<'EOF'
usage: bash launch.sh <command> [flags passed on]

  demo        the whole pipeline on real text, in minutes, on any machine: runs/demo/
  prep        text -> sentences -> vocabulary -> HDF5 shards       (prep --help lists its commands)
  pretrain    shards -> a pretrained model, with DeepSpeed
  sst2 cola mrpc stsb qqp mnli qnli rte wnli ax
              fine-tune the newest pretrained model on a GLUE task
  squad       the same on SQuAD v1.1, questions about paragraphs
  glue        every GLUE task that there is data for, and one table
  finetune    any task, your own files too: --task_name custom (finetune --help)
  predict     a fine-tuned model -> the class of each text that you give, with its probabilities
  plan        what a pretraining would take on GPUs that are not at hand: time, memory, cost
  report      run folders -> a page of curves; --serve follows them
  doctor      what this machine has, which kernels it will use and why, what is missing
  bench       the benchmarks that a CPU can run, beside the peers; reports in benchmarks/
  test        the tests; test --slow adds the long ones; other flags go to pytest
  check       lint, format, types, imports, shell
  help        this text
EOF
}

runs_python_310() { "$1" -ISc 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

# Prints a Python that is new enough and can make a virtual environment. A name on PATH proves nothing:
# version managers put shims there that only print an error.
find_python() {
    local name new_enough=
    for name in python3 python3.13 python3.12 python3.11 python3.10 python; do
        if ! runs_python_310 "$name"; then continue; fi
        new_enough=$(command -v "$name")
        if "$name" -Ic 'import ensurepip, venv' 2>/dev/null; then
            "$name" -ISc 'import sys; print(sys.executable)'
            return
        fi
    done
    if [ -n "$new_enough" ]; then
        die "$new_enough can't make a virtual environment (no ensurepip); on Debian and Ubuntu:" \
            "apt-get install python3-venv; or set ZEROBERT_PYTHON to the python of an environment you have"
    fi
    die "wanted Python 3.10 or newer on PATH, found $(python3 --version 2>&1 || true);" \
        "install one, or set ZEROBERT_PYTHON to its path"
}

# One line that changes whenever the environment has to be made anew or brought up to date.
fingerprint() {
    "$venv/bin/python" -ISc 'import sys; print(sys.version.split()[0])' 2>/dev/null || return
    cat "$root/pyproject.toml" "$root/constraints.txt" | cksum
    printf '%s\n' "$root"
}

is_ready() { [ -f "$stamp" ] && [ "$(fingerprint)" = "$(cat "$stamp")" ]; }

# Whether the environment may be removed: a set-up left a file in it, or there is nothing in it.
is_ours() {
    [ -e "$marker" ] || [ -e "$stamp" ] || [ -e "$log" ] || [ -z "$(ls -A "$venv" 2>/dev/null)" ]
}

install() {
    local base
    trap 'exit 130' INT # pip turns Ctrl-C into an exit code of its own
    if [ -f "$marker" ] || ! runs_python_310 "$venv/bin/python" ||
        ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        is_ours || die "$venv is there, not made by this script, and can't be used (it wants Python 3.10" \
            "and pip): remove it, or set ZEROBERT_PYTHON to the python of an environment you have"
        base=$(find_python)
        say "setting up $venv with $base; this happens once and takes some minutes (log: $log)"
        rm -rf "$venv"
        mkdir "$venv"
        touch "$marker"
        "$base" -m venv "$venv" >"$log" 2>&1 || die "$base -m venv failed: $(tail -n 1 "$log")"
    else
        say "bringing $venv up to date (log: $log)"
        touch "$marker"
    fi
    rm -f "$stamp"
    if ! "$venv/bin/python" -m pip install --disable-pip-version-check \
        --constraint "$root/constraints.txt" --editable "${root}[dev,hub]" >>"$log" 2>&1; then
        tail -n 15 "$log" >&2
        die "pip could not install the dependencies (above: the end of $log);" \
            "mend that and run the same command again"
    fi
    fingerprint >"$stamp"
    rm -f "$marker"
    say "set up in $SECONDS s"
    trap - INT
}

# Leaves the path of the Python to use in $python, and its folder first on PATH.
set_up() {
    if [ -n "${ZEROBERT_PYTHON:-}" ]; then
        runs_python_310 "$ZEROBERT_PYTHON" ||
            die "ZEROBERT_PYTHON=$ZEROBERT_PYTHON is not a Python of 3.10 or newer that runs"
        python=$("$ZEROBERT_PYTHON" -ISc 'import sys; print(sys.executable)')
        "$python" "$root/zerobert/doctor.py" --required || exit
    else
        if ! is_ready; then
            exec 9<"$root"
            if command -v flock >/dev/null; then
                flock --nonblock 9 || { say "waiting for another set-up of $venv"; flock 9; }
            fi
            is_ready || install # another call may have done it while this one waited
            exec 9<&-
        fi
        python=$venv/bin/python
    fi
    export PATH="${python%/*}:$PATH" PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
}

# Runs every check even if one fails, shows what the failing ones say, and fails if any failed.
check() {
    local failed=0 output
    cd "$root"
    while read -r -a words; do
        if output=$("${words[@]}" 2>&1); then
            printf 'ok      %s\n' "${words[*]}"
        else
            printf 'FAILED  %s\n%s\n' "${words[*]}" "$output"
            failed=1
        fi
    done <<'EOF'
ruff check .
ruff format --check .
mypy
lint-imports
shellcheck launch.sh .ci/run
EOF
    return "$failed"
}

run_tests() {
    local cores workers selection=(-m "not slow") flags=()
    for flag in "$@"; do
        if [ "$flag" = --slow ]; then selection=(); else flags+=("$flag"); fi
    done
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    workers=$((cores < 4 ? cores : 4))
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores / workers))}"
    cd "$root"
    exec "$python" -m pytest -n "$workers" ${selection[@]+"${selection[@]}"} ${flags[@]+"${flags[@]}"}
}

main() {
    local command=${1:-}
    [ $# -eq 0 ] || shift
    pwd -P >/dev/null 2>&1 || die "the folder that you stand in is gone; go to another one"
    case $command in
        help | -h | --help) usage; exit ;;
        "") usage >&2; exit 2 ;;
        demo | prep | pretrain | finetune | squad | predict | plan | report | bench | doctor | test | check) set_up ;;
        sst2 | cola | mrpc | stsb | qqp | mnli | qnli | rte | wnli | ax | glue) set_up ;;
        *) die "unknown command '$command'; \`bash launch.sh help\` lists them" ;;
    esac
    # exec, so that signals reach the program itself and its exit code is ours. Files and not `-m`,
    # which would prefer a package of the same name in the folder where the user stands.
    case $command in
        demo) exec "$python" "$root/demo/__main__.py" "$@" ;;
        prep) exec "$python" "$root/data_prep/__main__.py" "$@" ;;
        pretrain) exec "$python" "$root/zerobert/launcher.py" "$root/pretrain/run.py" "$@" ;;
        finetune) exec "$python" "$root/finetune/run_glue.py" "$@" ;;
        squad) exec "$python" "$root/finetune/run_squad.py" "$@" ;;
        predict) exec "$python" "$root/finetune/predict.py" "$@" ;;
        plan) exec "$python" "$root/pretrain/plan.py" "$@" ;;
        bench) exec "$python" "$root/benchmarks/bench.py" "$@" ;;
        report) exec "$python" "$root/pretrain/report.py" "$@" ;;
        doctor) exec "$python" "$root/zerobert/doctor.py" "$@" ;;
        test) run_tests "$@" ;;
        check) [ $# -eq 0 ] || die "check takes no flags, got: $*"; check ;;
        *) exec "$python" "$root/finetune/run_glue.py" --task_name "$command" "$@" ;;
    esac
}

main "$@"
