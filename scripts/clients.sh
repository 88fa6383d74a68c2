#!/usr/bin/env bash
# Real clients of OpenAI's protocol, each in an environment of its own, for tests/serve/test_foreign_clients.py.
# Nothing is installed into the product's environment. SNELLO_CLIENTS names another folder.
set -euo pipefail
here="${SNELLO_CLIENTS:-$HOME/.cache/snello/clients}"
python="${PYTHON:-python3}"

environment() { # NAME PACKAGE...
    local home="$here/$1" stamp
    shift
    stamp="$home/installed"
    [[ -f $stamp && $(<"$stamp") == "$*" ]] && return
    echo "installing $*" >&2
    rm -rf "$home"
    "$python" -m venv "$home"
    "$home/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
    echo "$*" > "$stamp"
}

environment langchain 'langchain-openai>=1,<2'
environment litellm 'litellm>=1.80,<2'
environment schemathesis 'schemathesis==4.32.5'
environment lm-eval 'lm-eval[api]==0.4.13' 'transformers>=5,<6'
if command -v npm > /dev/null; then
    mkdir -p "$here/node"
    echo "installing openai for node" >&2
    (cd "$here/node" && npm install --silent --no-audit --no-fund --no-save 'openai@6')
fi
