"""One pass of the teacher: which signals it gives, and under which identity they are stored."""
