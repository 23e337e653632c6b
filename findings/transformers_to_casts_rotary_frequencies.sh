#!/usr/bin/env bash
# A model of transformers in bfloat16 comes about in two ways: made and then `.to(torch.bfloat16)`, or saved and loaded
# by from_pretrained. Their parameters are equal bit for bit; what they compute is not.
#
# Likely guess: equal parameters, equal dtype, equal configuration: equal logits.
# Seen: `.to` also casts the rotary frequencies, a buffer that no file holds; from_pretrained leaves them in float32. An
# oracle must be loaded in the same way as what it is compared with.
#
# Exits with 0 if it is still so, and with 1 if the behaviour changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q transformers==5.24.0

cat > "$folder/look.py" <<'PYTHON'
import sys
import tempfile

import torch
import transformers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
config = transformers.LlamaConfig(
    vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
)
torch.manual_seed(0)
made = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
token_ids = torch.randint(97, (1, 64))
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    made.save_pretrained(folder)
    loaded = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    same_weights = all(map(torch.equal, made.parameters(), loaded.parameters()))
    same_logits = torch.equal(made(token_ids).logits, loaded(token_ids).logits)
dtypes = [model.model.rotary_emb.inv_freq.dtype for model in (made, loaded)]

print(f"transformers {transformers.__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}")
print(f"one model made and cast, one saved and loaded; parameters equal: {same_weights}")
print("  likely guess: logits are equal too")
print(f"  seen:         logits equal: {same_logits}; rotary frequencies are {dtypes[0]} and {dtypes[1]}")
sys.exit(0 if same_weights and not same_logits and dtypes == [torch.bfloat16, torch.float32] else 1)
PYTHON
"$folder/venv/bin/python" "$folder/look.py"
