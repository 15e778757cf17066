"""blasst inside other programs; nothing of blasst imports this."""
