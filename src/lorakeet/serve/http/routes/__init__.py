"""Routes of the server, a file for each subject; app.py puts them together."""
