"""The student as files that run elsewhere, each held against the trained student."""
