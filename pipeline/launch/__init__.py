"""Runs steps, here or on a cluster, and shows how they get on."""
