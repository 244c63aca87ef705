"""What is asked for, as checked tables. No torch, no Ray."""
