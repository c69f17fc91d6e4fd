"""Threads, processes and forks that use one store."""
