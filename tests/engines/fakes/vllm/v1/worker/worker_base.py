# ruff: noqa: ARG002 - parameters are what these files are for
class WorkerBase:
    def __init__(self, vllm_config, local_rank, rank, distributed_init_method, is_driver_worker=False):
        self.vllm_config = vllm_config
