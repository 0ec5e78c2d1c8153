"""The built-in tasks: real data that comes with Python and scikit-learn, nothing to download."""
