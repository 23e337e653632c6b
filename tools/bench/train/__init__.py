"""`tierstore bench train`: steps of training beside other trainers, cold reads and prefetches."""
