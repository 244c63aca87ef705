"""What was measured, with control, seeds and interval; runs compared."""
