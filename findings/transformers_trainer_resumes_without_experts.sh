#!/usr/bin/env bash
# transformers' Trainer, resumed from a checkpoint that it wrote itself, with a mixture-of-experts model.
#
# Likely guess: the run goes on with the checkpoint's weights.
# Seen: the experts stay as the caller's model had them before. save_pretrained writes each expert's weights by
# themselves; the Trainer reads them with load_state_dict(strict=False) into a model whose experts are fused, and a
# warning lists keys. Optimizer, scheduler and all other weights are resumed. So the model that is resumed must be
# loaded from that checkpoint by from_pretrained, which does put experts together.
#
# Exits with 0 if it is still so, and with 1 if the behaviour changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
cd "$folder"
"$folder/venv/bin/python" - <<'PY' 2>errors.txt || { cat errors.txt; exit 1; }
import torch
import transformers

print("torch", torch.__version__, "transformers", transformers.__version__)
print("guess: a run that is resumed from a checkpoint goes on with the checkpoint's weights")
SIZES = dict(vocab_size=64, hidden_size=16, intermediate_size=16, moe_intermediate_size=16, num_hidden_layers=1,
             num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=4, num_experts_per_tok=2)


def made():
    torch.manual_seed(0)
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES))


class Look(transformers.TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **_):
        if state.global_step == 2:
            self.weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}


def weights_at_step_2(resume):
    look, model = Look(), made()
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 64, (16, 8), generator=torch.Generator().manual_seed(1))]
    arguments = transformers.TrainingArguments("out", max_steps=3, save_steps=2, learning_rate=0.1, use_cpu=True, report_to=[],
                                               disable_tqdm=True, logging_strategy="no")
    transformers.Trainer(model, arguments, train_dataset=data, callbacks=[look]).train(resume_from_checkpoint=resume)
    return look.weights


whole = weights_at_step_2(None)
resumed = weights_at_step_2("out/checkpoint-2")
initial = dict(made().named_parameters())
different = [name for name in whole if not torch.equal(whole[name], resumed[name])]
print("seen: weights that are not the checkpoint's after resuming:", different)
print("seen: they are as before the first step:", all(torch.equal(resumed[name], initial[name]) for name in different))
assert different == ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"], different
assert all(torch.equal(resumed[name], initial[name]) for name in different)
PY
