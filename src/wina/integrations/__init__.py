"""Integrations: one module for each engine, through its public extension points."""
