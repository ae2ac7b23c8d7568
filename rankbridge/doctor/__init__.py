"""The path doctor: what the plan says of the way between the sites, measured, and each fault named with its remedy."""
