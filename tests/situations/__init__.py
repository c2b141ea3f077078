"""Situations that users report, with their neighbours: one file for each kind."""
