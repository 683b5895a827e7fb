"""Rows of files and hubs, checked and turned into records."""
