"""The rooms: one file per op family."""
