"""Formats that other tools read and write, each proved by a round trip."""
