"""What the hardware allows: bare loops over the same bytes, without a store."""
