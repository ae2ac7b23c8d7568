"""The service at home that acknowledges events once they are on disk."""
