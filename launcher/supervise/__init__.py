"""Keeps a run alive: starts its workers, watches them, explains how they ended, and decides what happens next."""
