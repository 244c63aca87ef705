"""What `ray job submit` runs: one thin module a verb, the same as the command line's."""
