# ruff: noqa: ARG002 - parameters are what these files are for
class Qwen4ExpModelState:
    def __init__(self, vllm_config, model, encoder_cache, device):
        self.model = model

    def prepare_inputs(self, input_batch, req_states):
        return {"query_start_loc": input_batch.query_start_loc, "ngram_context": None}
