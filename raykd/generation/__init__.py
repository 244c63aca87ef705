"""Text that models write: the student's own rows, and drafts that the teacher tests."""
