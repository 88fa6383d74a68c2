"""Recomputes the proof with Transformers alone. Needs: torch, transformers.

snello export THIS_FOLDER --to hf -o hf     # the lean model in plain numbers
python verify.py ORIGINAL hf                # ORIGINAL: the model you started from
"""

import json
import math
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

HERE = Path(__file__).resolve().parent
PROOF = json.loads((HERE / "proof.json").read_text())  # token windows, where scoring begins, the receipt's numbers


def mean_loss(folder: str) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for window, scored_from in zip(PROOF["windows"], PROOF["scored_from"], strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([window])).logits[0, :-1].log_softmax(-1)  # (T - 1, V)
        targets = torch.tensor(window[1:])[:, None]
        scored = -logits.gather(1, targets)[scored_from - 1 :]
        total, count = total + scored.double().sum().item(), count + len(scored)
    return total / count


if len(sys.argv) != 3:
    sys.exit(__doc__)
original, lean = (mean_loss(folder) for folder in sys.argv[1:])
loss = math.exp(lean - original) - 1
print(f"perplexity {math.exp(original):.4f} -> {math.exp(lean):.4f}: {100 * loss:+.3f}%")
said = f"{PROOF['perplexity_original']:.4f} and {100 * PROOF['loss']:+.3f}%, at most {100 * PROOF['loss_high']:.3f}%"
print(f"the receipt says {said}")
same = abs(math.exp(original) / PROOF["perplexity_original"] - 1) < 0.002  # number types differ, not the model
sys.exit(0 if same and loss <= PROOF["loss_high"] + 0.001 else 1)
