"""Training and evaluation samples from a store."""
