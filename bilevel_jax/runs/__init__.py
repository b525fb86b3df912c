"""Configuration, tasks, training and reports shared by the commands."""
