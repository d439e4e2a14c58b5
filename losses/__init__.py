"""The losses that come with the project, by family; `trainers.py` takes them over by name."""
