"""Mutation testing of the harness: planted mistakes that it must find and name."""
