"""The tasks themselves: one YAML file of the evaluation harness each, and what they share."""
