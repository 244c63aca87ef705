"""Quantisation-aware training: weights and activations rounded as the runtime that will execute
them rounds.
"""
