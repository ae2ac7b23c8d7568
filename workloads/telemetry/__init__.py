"""How every process says what it does: JSON lines, progress, metrics. Knows no deployable."""
