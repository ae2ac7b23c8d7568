"""What home learns from new events: they go from the spool into the lake and into the profiles, within seconds."""
