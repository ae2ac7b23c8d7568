"""Behaviour events at home: Parquet by day and type, for DuckDB, and the same files as Iceberg tables."""
