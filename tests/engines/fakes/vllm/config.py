import enum

current = [None]


def get_current_vllm_config():
    return current[0]


class CUDAGraphMode(enum.Enum):
    NONE = 0
    PIECEWISE = 1
    FULL_AND_PIECEWISE = 2

    def has_full_cudagraphs(self):
        return self is CUDAGraphMode.FULL_AND_PIECEWISE
