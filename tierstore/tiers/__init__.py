"""The tiers: mechanisms that hold or read rows. A tier does not know its neighbours;
the store moves entries between."""
