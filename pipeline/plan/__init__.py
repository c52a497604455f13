"""From settings to steps and their records. No torch here."""
