"""A person forgotten: spool, lake, profiles, data sets and replicas."""
