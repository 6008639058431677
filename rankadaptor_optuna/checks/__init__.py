"""Checks of what users and other writers give: numbers, folders, installed extras, text that is safe to show."""
