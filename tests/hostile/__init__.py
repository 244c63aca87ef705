"""Inputs that were made to harm: for each its documented exit code and what its message names."""
