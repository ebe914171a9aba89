"""Atomic files, folders and tables; locks; canonical JSON, hashes and keys."""
