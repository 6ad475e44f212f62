"""One file for each experiment: a header, and what differs from `_base`."""
