"""Loops in C on the CPU: build, features, shared layout, products and elementwise operations."""
