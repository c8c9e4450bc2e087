"""Everything that touches a tensor."""
