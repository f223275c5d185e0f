"""What this machine can do, what it must not, and how calls are timed."""
