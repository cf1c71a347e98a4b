"""The model for other runtimes: programs with explicit state (Sec. 3.1), a group of frames at a time. Not in the paper."""
