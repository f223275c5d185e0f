"""No kernel may get slower unnoticed: `make bench-check`."""
