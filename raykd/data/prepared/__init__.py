"""Rows that are prepared once: what is no parts yet becomes parts that every later run reads."""
