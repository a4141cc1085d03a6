"""From a user's CT to a store: what `lidnet-fast prepare` runs."""
