"""The page on which a person at a site looks at what was decided, and decides otherwise."""
