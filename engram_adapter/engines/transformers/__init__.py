"""transformers: models of the qwen4_exp family whose n-gram rows come from a store.

`loading`: a model whose tables are never loaded · `swap`: one whose tables are resident, and are replaced · `prefetch`:
reads that start with the model's forward · `saved_tables`: such a model saved, with its tables.
"""
