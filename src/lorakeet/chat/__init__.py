"""Conversations: messages as templates read them, rendering, and the spans of the assistant's turns."""
