"""The method library: one `.gkd` file a method."""
