"""Which plans are legal. Nothing is costed here."""
