#!/bin/sh
# Prepares .venv for the Makefile: setup.sh cpu|gpu (the environment), dev (what the tests need on
# top), lock (the locks, from pyproject.toml).
set -eu
cd "$(dirname "$0")/.."

what=$1
shift
here=$(pwd -P)
python=.venv/bin/python
export UV_PYTHON_DOWNLOADS=never
# uv does not read pip's configuration; who needs a mirror has often told pip alone.
[ -z "${PIP_INDEX_URL:-}" ] || export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}"

say() { printf 'set-up: %s\n' "$*" >&2; }
refuse() {
    say "$@"
    exit 2
}

version_of() { "$1" -c 'import sys; print("Python %d.%d.%d" % sys.version_info[:3])' 2>/dev/null; }
suits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; }

# Prints the interpreter to build from. A name on PATH proves nothing (pyenv's shims exist for
# versions that are not active), so each candidate is run.
find_python() {
    if [ -n "${PYTHON:-}" ]; then
        suits "$PYTHON" || refuse "PYTHON=$PYTHON is $(version_of "$PYTHON" || echo 'not a Python');" \
            "Python 3.11, 3.12 or 3.13 is needed"
        echo "$PYTHON"
        return
    fi
    seen=
    for name in python3 python3.13 python3.12 python3.11 python; do
        if suits "$name"; then
            echo "$name"
            return
        fi
        [ -n "$seen" ] || seen=$(version_of "$name") || seen=
    done
    if command -v uv >/dev/null && uv python find '>=3.11,<3.14' 2>/dev/null; then
        return
    fi
    refuse "Python 3.11, 3.12 or 3.13 is needed, found ${seen:-none};" \
        "install one, or name it: make setup PYTHON=/path/to/python3"
}

# Removes an environment that cannot be trusted: half installed, or from a folder that was moved
# or copied (scripts and the editable install hold absolute paths). Wheels stay in uv's cache.
remove_broken() {
    [ -e .venv ] || return 0
    if [ -e .venv/.unfinished ]; then
        say "an earlier set-up did not finish; starting again"
    elif [ -e .venv/.location ] && [ "$(cat .venv/.location)" != "$here" ]; then
        say "the folder was moved; preparing .venv again"
    elif [ -e .venv/.location ] && ! suits $python; then
        say "the Python of .venv is gone; preparing it again"
    elif suits $python; then
        return 0
    else
        refuse ".venv holds $(version_of $python || echo 'no working Python');" \
            "Python 3.11, 3.12 or 3.13 is needed: remove .venv and run make again"
    fi
    rm -rf .venv
}

require_space() {
    case $what in gpu) needed_mb=9000 ;; *) needed_mb=3000 ;; esac
    free_mb=$(df -Pk . | awk 'NR == 2 { print int($4 / 1024) }')
    [ "$free_mb" -ge $needed_mb ] || refuse "$here has $free_mb MB free; the $what environment" \
        "needs about $needed_mb MB"
}

create() {
    base=$(find_python)
    require_space
    # Debian splits venv's half that brings pip into a package of its own; uv needs no pip.
    if ! command -v uv >/dev/null && ! "$base" -c 'import ensurepip, venv' 2>/dev/null; then
        minor=$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        refuse "$base cannot make environments; install its venv module" \
            "(Debian, Ubuntu: apt install python$minor-venv), or uv"
    fi
    say "making .venv with $(version_of "$base")"
    mkdir -p .venv
    touch .venv/.unfinished
    if command -v uv >/dev/null; then
        "$base" -m venv --without-pip .venv
    else
        "$base" -m venv .venv
    fi
}

# Sets $uv: the one on PATH, else one inside .venv.
find_uv() {
    if ! uv=$(command -v uv); then
        uv=.venv/bin/uv
        "$uv" --version >/dev/null 2>&1 ||
            $python -m pip install --quiet --disable-pip-version-check --require-hashes \
                -r requirements/bootstrap.lock
    fi
}

# tensorflow and tensorflow-cpu own the same files: installing one beside the other leaves a
# mixture, and removing one afterwards takes files of the other. So the other goes first.
remove_other_tensorflow() {
    case $what in gpu) other=cpu ;; *) other=gpu ;; esac
    [ -e .venv/.stamp-$other ] || return 0
    say "changing from $other to $what"
    "$uv" pip uninstall --quiet --python $python tensorflow tensorflow-cpu
    rm .venv/.stamp-$other
}

# Installs what was asked for under the mark .unfinished. A failure that uv reports comes before
# it changes anything (no network, say), so an environment that was complete stays in use.
install() {
    complete=$(ls .venv/.stamp-* 2>/dev/null) || complete=
    touch .venv/.unfinished
    "$@" || {
        status=$?
        [ -z "$complete" ] || [ $status -ge 128 ] || rm .venv/.unfinished
        refuse "did not finish; the next make goes on from here"
    }
    rm .venv/.unfinished
}

install_device() {
    remove_other_tensorflow
    say "installing TensorFlow ($what), Ray and MLflow; takes minutes the first time"
    "$uv" pip install --python $python --require-hashes -r "requirements/$what.lock" &&
        # The build backend is the locked setuptools, which TensorFlow depends on.
        "$uv" pip install --quiet --python $python --no-deps --no-build-isolation --editable .
}

# Writes the bytecode of what a run imports: a quarter of what is installed, so far quicker than
# compiling all of it, and where PYTHONDONTWRITEBYTECODE is set (it is in many container images)
# nobody else would: every process would compile TensorFlow again, 9 s each time on 2 cores.
warm_up() {
    export PYTHONDONTWRITEBYTECODE= TF_CPP_MIN_LOG_LEVEL=3
    $python -c 'import tensorflow' 2>/dev/null &
    $python -c '
import hydra, psutil, ray, rich.progress
import mlflow.pyfunc, mlflow.store.tracking.sqlalchemy_store
import matplotlib.backends.backend_agg, matplotlib.figure' 2>/dev/null || :
    wait
}

install_dev() {
    "$uv" pip install --python $python --require-hashes -r requirements/dev.lock
}

compile() {
    out=requirements/$1.lock
    shift
    "$uv" pip compile --quiet --python $python --python-version 3.11 --universal \
        --generate-hashes --no-header --no-emit-index-url --output-file "$out" "$@"
}

# Two set-ups at once would trample on each other: the second waits, then finds the work done.
exec 9<requirements
! command -v flock >/dev/null || flock 9

remove_broken
[ -e .venv ] || create
find_uv
case $what in
cpu | gpu)
    install install_device
    warm_up
    printf '%s\n' "$here" >.venv/.location
    ;;
dev) install install_dev ;;
lock)
    # cpu first; the others agree with it, so that every environment has the same versions.
    compile cpu pyproject.toml --extra cpu "$@"
    compile gpu pyproject.toml --extra gpu --constraints requirements/cpu.lock "$@"
    compile dev --group dev --constraints requirements/cpu.lock "$@"
    compile bootstrap --group bootstrap "$@"
    rm -f .venv/.unfinished
    ;;
*) refuse "'$what' is none of cpu, gpu, dev, lock" ;;
esac
