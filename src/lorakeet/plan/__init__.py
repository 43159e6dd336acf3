"""The plan of a training: memory, time and disk that it will take, and changes that make it fit."""
