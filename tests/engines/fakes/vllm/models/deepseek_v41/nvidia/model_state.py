# ruff: noqa: ARG002 - parameters are what these files are for
class DeepseekV41ModelState:
    def __init__(self, vllm_config, model, encoder_cache, device):
        self.model = model

    def prepare_inputs(self, input_batch, req_states):
        return {"lookback_token_ids": input_batch.lookback}
