#!/usr/bin/env bash
# The first five minutes: this machine, a model, its lean twin with the proof, both side by side. Run by `make demo`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
lean=lean/demo
text=build/demo/held_out.jsonl
prompt='def area(radius):'

say() { printf '\n== %s\n\n' "$*"; }

say "this machine"
snello doctor

say "a small original, streaming"
snello run demo "$prompt" --max-tokens 60 --seed 1

say "made lean, with the proof: text that the model has never seen"
mkdir -p "$(dirname "$text")"
python - "$text" <<'PYTHON'
import json, sys
from snello.models.demo.held_out import read_held_out

with open(sys.argv[1], "w") as file:
    file.writelines(json.dumps({"text": text}) + "\n" for _, text in read_held_out())
PYTHON
snello optimize demo --text "$text" --max-loss 1% --goal latency -o "$lean" --time-budget 5m --overwrite

say "this machine at 1.1 B parameters: measured, of possible"
snello bench --shape tinyllama-1.1b --weights int4 --prompt 128 --generate 32 --repeats 3

say "original and lean, the first token that differs marked"
if [ -d "$lean" ]; then
  snello run --compare demo "$lean" "$prompt" --max-tokens 60
else
  echo "nothing paid on this machine: the original stays"
fi

say "your own model"
echo "snello optimize Qwen/Qwen3-0.6B --text yours.txt --max-loss 1% --goal latency"
