"""`tierstore bench commit`: commits of a training, beside other ways to make the same rows durable."""
