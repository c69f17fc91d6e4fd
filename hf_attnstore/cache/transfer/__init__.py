"""Keys and values on their way between the store and the layers."""
