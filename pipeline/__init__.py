"""What benchmark.py stands on: settings, plan, launchers, bookkeeping and report. No torch here."""
