"""The teacher store: a teacher's signals, scored once, verified, read by any number of students."""
