"""Bytes that are whole or absent, in a folder or a bucket."""
