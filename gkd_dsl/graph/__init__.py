"""The typed graph of a spec, its passes, and the plan that comes of them."""
