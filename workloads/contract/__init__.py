"""Facts that cross a border between processes, each at its only address.

Ports and addresses are in `sites`, wire records in `events` and `http`, tensor names and feature
orders in `tensors`, promises about time and quality in `slo`. Nothing here does anything: no file,
socket, clock or environment variable is read, and nothing outside the standard library, msgspec and
numpy is imported.
"""
