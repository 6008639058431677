"""Shared databases: connections without passwords in messages, and the attributes that stand in a study."""
