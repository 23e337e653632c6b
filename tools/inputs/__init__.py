"""Token inputs: what files and folders of tokens or text hold, in whatever container."""
