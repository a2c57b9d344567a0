"""Containers and exports: how a checkpoint announces itself to other tools."""
