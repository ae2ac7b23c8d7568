"""Behaviour data at home: events, simulator, adapters, splits, features, profiles. Knows no model."""
