"""The built-in data set, made of docstrings of installed packages."""
