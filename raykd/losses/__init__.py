"""What a loss term is, the shared ones, and how terms become one number."""
