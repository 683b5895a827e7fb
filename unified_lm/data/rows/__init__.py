"""Rows of files and Hub data sets, validated and parsed into records."""
