"""Benchmarks: ratios to baselines written as a competent user would write them, `python -m
pipelines.bench.NAME`.
"""
