"""From the features file to a trained run of State."""
