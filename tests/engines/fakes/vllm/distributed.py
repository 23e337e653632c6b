ranks = {"rank": 0, "size": 1}


def get_tensor_model_parallel_rank():
    return ranks["rank"]


def get_tensor_model_parallel_world_size():
    return ranks["size"]


def tensor_model_parallel_all_gather(tensor, dim):
    raise AssertionError(f"a test of one rank gathers {tensor.shape} over {dim}")
