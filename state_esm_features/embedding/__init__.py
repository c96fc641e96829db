"""From perturbation labels to the features file."""
