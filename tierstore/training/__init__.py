"""Training: rows that change, with their optimizer state, in the same tiers as the rows that are served.

    training = tierstore.open_training("model.tier", tierstore.RowWiseAdagrad(lr=0.01), dram="16GiB")
    values = training["layers.1"].gather(row_ids)
    training["layers.1"].apply(row_ids, gradients)
    training.commit(step).wait()

`opening` opens one, `training` is the object, `table` one of its tables. A row that no step touched is the store's own,
decoded (`base`). The newest record of any other lies in a DRAM cache, or in a run file that the `writer` wrote.
"""
