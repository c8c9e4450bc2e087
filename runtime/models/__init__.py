"""Models with weights, and the tensors tapped inside them."""
