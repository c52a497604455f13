"""What every command stands on, by subject. It knows nothing of the project, and no torch."""
