"""The common ground of all pillars: models, engines, learning, texts, the wire, commands. Imports no pillar."""
