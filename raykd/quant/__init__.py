"""Quantisation-aware training: weights and activations rounded as their runtime will round them."""
