#!/usr/bin/env bash
# Models of transformers say by a class attribute whether torch.compile can take them as one graph.
#
# Likely guess: Qwen4ExpForCausalLM, which says so, compiles with fullgraph=True.
# Seen: it does not: the sparse attention's indexer branches on a number that only the data say. With layers of linear
# attention alone, the same class compiles.
#
# Exits with 0 if it is still so, and with 1 if the behaviour changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q transformers==5.24.0

cat > "$folder/look.py" <<'PYTHON'
import logging
import sys

import torch
import transformers

logging.disable(logging.CRITICAL)
transformers.logging.set_verbosity_error()


def compiled(**changes: object) -> str:
    values = {
        "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16, "num_experts_per_tok": 2, "num_experts": 4, "hc_count": 2,
        "hc_lowrank": 8, "ple_layer_ids": [2], "ple_embed_dim": 64, "ngram_size": 3, "heads_per_ngram": 4,
        "ngram_vocab_size_base": 500, "split_ngram_parts": 4, "indexer_n_heads": 2, "indexer_kv_heads": 1,
        "indexer_head_dim": 16, "indexer_budget": 64, "indexer_compress_ratio": 4, "max_position_embeddings": 256,
        "eos_token_id": 3, "pad_token_id": 0, "bos_token_id": 1,
    }
    torch.manual_seed(0)
    config = transformers.Qwen4ExpTextConfig(**(values | changes))
    model = transformers.Qwen4ExpForCausalLM(config).eval()
    torch._dynamo.reset()
    try:
        with torch.no_grad():
            torch.compile(model, fullgraph=True, backend="eager")(torch.randint(4, 97, (1, 16)), use_cache=False)
    except Exception as error:  # of several classes, by version
        return f"refused ({type(error).__name__})"
    return "compiled"


claimed = transformers.Qwen4ExpForCausalLM._can_compile_fullgraph
whole, linear = compiled(), compiled(layer_types=["linear_attention"] * 4)
print(f"transformers {transformers.__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}")
print(f"Qwen4ExpForCausalLM._can_compile_fullgraph is {claimed}")
print("  likely guess: fullgraph=True compiles")
print(f"  seen:         {whole}; with linear attention alone: {linear}")
sys.exit(0 if claimed and whole.startswith("refused") and linear == "compiled" else 1)
PYTHON
"$folder/venv/bin/python" "$folder/look.py"
