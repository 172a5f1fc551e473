"""Weights from elsewhere: foreign formats, head initialisation, teachers."""
